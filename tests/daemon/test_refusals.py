"""After a refusal a program keeps its port, and cannot reach another one's."""

from __future__ import annotations

import contextlib
import socket

import pytest

import vsockets
from vsockets.testing import PrivateFabric

DATAGRAM = socket.SOCK_DGRAM


def test_a_bound_socket_of_a_guest_at_its_limit_stays_bound(vsock_fabric: PrivateFabric) -> None:
    guest = vsock_fabric.guest(3, limits={"sockets": 2})
    with vsockets.socket(context=guest) as one, vsockets.socket(context=guest) as other:
        one.bind((3, 5000))
        other.bind((3, 5001))
        with pytest.raises(ConnectionResetError):
            one.connect((2, 5000))  # without a listener
        held = [(row["port"], row["state"]) for row in vsock_fabric.control.sockets()]
        assert held == [(5000, "bound"), (5001, "bound")]
        with vsockets.create_server((2, 5000), context=vsock_fabric.host):
            one.connect((2, 5000))
            assert one.getsockname() == (3, 5000)


def test_a_datagram_to_a_closed_socket_reaches_no_other(vsock_fabric: PrivateFabric) -> None:
    """Not even its sender: to bind the sender, vsockd may probe sockets, release closed ones, and
    reuse the descriptor that it reached the receiver by.
    """
    host = vsock_fabric.host
    for already_bound in range(64):  # it looks each time so many were bound
        with contextlib.ExitStack() as others:
            vsock_fabric.control.sockets()
            receiver = vsockets.socket(type=DATAGRAM, context=host)
            receiver.bind((2, 5000))
            for _ in range(already_bound):
                sock = others.enter_context(vsockets.socket(type=DATAGRAM, context=host))
                sock.bind((2, vsockets.VMADDR_PORT_ANY))
            receiver.close()
            sender = others.enter_context(vsockets.socket(type=DATAGRAM, context=host))
            with pytest.raises(ConnectionRefusedError):
                sender.sendto(b"x", (2, 5000))
