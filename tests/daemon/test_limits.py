"""Limits of a guest, as its programs and its administrator meet them."""

from __future__ import annotations

import errno
import socket

import pytest

import vsockets
from vsockets.testing import PrivateFabric


def test_a_guest_with_as_many_sockets_as_it_may_have(vsock_fabric: PrivateFabric) -> None:
    guest = vsock_fabric.guest(3, limits={"sockets": 2})
    other = vsock_fabric.guest(4)
    with (
        vsockets.create_server((3, 5000), context=guest),
        vsockets.socket(type=socket.SOCK_DGRAM, context=guest) as datagrams,
        vsockets.socket(context=guest) as third,
    ):
        datagrams.bind((3, 5000))
        with pytest.raises(OSError) as refusal:
            third.bind((3, 5001))
        assert refusal.value.errno == errno.ENOBUFS
        (row,) = [row for row in vsock_fabric.control.contexts() if row["cid"] == 3]
        assert row["usage"]["sockets"] == 2
        assert row["limits"]["sockets"] == 2
        assert row["denials"] == {"sockets": 1}
        assert vsock_fabric.control.status()["limits_met"] == 1
        vsockets.create_server((4, 5000), context=other).close()  # the rest is not concerned
        datagrams.close()
        # vsockd looks for what has gone; at a guest's request not all the time.
        assert len(vsock_fabric.control.sockets()) == 1
        third.bind((3, 5001))


def test_a_bound_socket_stays_bound_when_a_guest_at_its_limit_is_refused(
    vsock_fabric: PrivateFabric,
) -> None:
    guest = vsock_fabric.guest(3, limits={"sockets": 2})
    with vsockets.socket(context=guest) as one, vsockets.socket(context=guest) as other:
        one.bind((3, 5000))
        other.bind((3, 5001))
        with pytest.raises(ConnectionResetError):
            one.connect((2, 5000))  # where nobody listens
        held = [(row["port"], row["state"]) for row in vsock_fabric.control.sockets()]
        assert held == [(5000, "bound"), (5001, "bound")]
        with vsockets.create_server((2, 5000), context=vsock_fabric.host):
            one.connect((2, 5000))
            assert one.getsockname() == (3, 5000)
