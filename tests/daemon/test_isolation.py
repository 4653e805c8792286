"""Host and guests, end to end: allowed and denied communication, errnos and log."""

from __future__ import annotations

import errno
import socket

import pytest

import vsockets
from vsockets.protocol import RECORD_SIZE, Op, Record, Request
from vsockets.testing import PrivateFabric

from .raw_client import enter, send_with

DATAGRAM = socket.SOCK_DGRAM


def test_another_guest_answers_like_a_missing_one(vsock_fabric: PrivateFabric) -> None:
    one, other = vsock_fabric.guest(3), vsock_fabric.guest(4)
    with (
        vsockets.create_server((4, 5000), context=other),
        vsockets.socket(type=DATAGRAM, context=other) as target,
        vsockets.socket(type=DATAGRAM, context=one) as sender,
    ):
        target.bind((4, 5000))
        told = set()
        for cid in (4, 5):
            with pytest.raises(OSError) as refusal:
                vsockets.create_connection((cid, 5000), context=one)
            told.add(str(refusal.value))
            with pytest.raises(OSError) as refusal:
                sender.sendto(b"x", (cid, 5000))
            told.add(str(refusal.value))
        assert told == {"[Errno 113] No route to host"}
    # The log has the real reason.
    assert "context 3 pid" in vsock_fabric.log
    assert "guest to guest: only host to guest is allowed" in vsock_fabric.log
    assert "no context 5" in vsock_fabric.log


def test_host_to_guest_and_back(vsock_fabric: PrivateFabric) -> None:
    guest = vsock_fabric.guest(3)
    for server_context, client_context, cid in (
        (vsock_fabric.host, guest, 2),
        (guest, vsock_fabric.host, 3),
    ):
        with (
            vsockets.create_server((cid, 5000), context=server_context) as server,
            vsockets.create_connection((cid, 5000), context=client_context) as client,
        ):
            accepted, source = server.accept()
            with accepted:
                assert source == client.getsockname()
                assert source[0] == client_context.cid
                client.sendall(b"there")
                assert accepted.recv(10) == b"there"
                accepted.sendall(b"and back")
                assert client.recv(10) == b"and back"


def test_a_datagram_has_its_true_source(vsock_fabric: PrivateFabric) -> None:
    guest = vsock_fabric.guest(3)
    with (
        vsockets.socket(type=DATAGRAM, context=vsock_fabric.host) as receiver,
        vsockets.socket(type=DATAGRAM, context=guest) as sender,
    ):
        receiver.bind((2, 5000))
        sender.bind((3, 6000))
        sender.sendto(b"x", (2, 5000))
        assert receiver.recvfrom(10) == (b"x", (3, 6000))


def test_a_guests_address_is_its_own(vsock_fabric: PrivateFabric) -> None:
    with vsockets.socket(context=vsock_fabric.guest(3)) as sock:
        for cid in (0, 2, 4):
            with pytest.raises(OSError) as refusal:
                sock.bind((cid, 5000))
            assert refusal.value.errno == errno.EADDRNOTAVAIL
        sock.bind((3, 5000))


LOCAL = vsockets.VMADDR_CID_LOCAL


def test_a_socket_with_the_local_cid_sends_within_its_context(vsock_fabric: PrivateFabric) -> None:
    """Elsewhere (1, port) would name a socket of the receiver's own context."""
    guest = vsock_fabric.guest(3)
    with (
        vsockets.socket(type=DATAGRAM, context=vsock_fabric.host) as away,
        vsockets.socket(type=DATAGRAM, context=guest) as home,
        vsockets.socket(type=DATAGRAM, context=guest) as sender,
    ):
        away.bind((2, 5000))
        home.bind((3, 5000))
        sender.bind((LOCAL, 6000))
        with pytest.raises(OSError) as refusal:
            sender.sendto(b"x", (2, 5000))
        assert refusal.value.errno == errno.EHOSTUNREACH
        sender.sendto(b"x", (3, 5000))
        assert home.recvfrom(10) == (b"x", (LOCAL, 6000))


def test_nor_does_a_program_without_the_library(vsock_fabric: PrivateFabric) -> None:
    with (
        vsockets.socket(type=DATAGRAM, context=vsock_fabric.host) as away,
        socket.socket(socket.AF_UNIX, DATAGRAM) as sender,
        enter(vsock_fabric.guest(3), socket.SOCK_SEQPACKET) as asking,
    ):
        away.bind((2, 5000))
        request = Request(Op.ROUTE, 0, LOCAL, 6000, 2, 5000)
        send_with(asking, request.encode(), [sender.fileno()])
        answer = Record.decode(asking.recv(RECORD_SIZE))
        assert errno.errorcode[answer.status] == "EHOSTUNREACH"


def test_a_removed_guests_connections_are_closed(vsock_fabric: PrivateFabric) -> None:
    guest = vsock_fabric.guest(3)
    with vsockets.create_server((3, 5000), context=guest) as server:
        vsock_fabric.control.remove_context(3)
        server.settimeout(10)
        with pytest.raises(OSError, match="vsockd") as told:
            server.accept()
        assert told.value.errno == errno.ENETDOWN
        with pytest.raises(OSError, match="No route") as refusal:
            vsockets.create_connection((3, 5000), context=vsock_fabric.host)
        assert refusal.value.errno == errno.EHOSTUNREACH
    # A new guest of that CID is another one.
    successor = vsock_fabric.guest(3)
    vsockets.create_server((3, 5000), context=successor).close()


def test_a_removed_parent(fabric: PrivateFabric) -> None:
    """A later guest with the parent's CID is a stranger to the parent's former child."""
    parent = fabric.guest()
    child = fabric.guest(parent=parent.cid)
    with vsockets.create_server((vsockets.VMADDR_CID_ANY, 7171), context=parent):
        vsockets.create_connection((parent.cid, 7171), context=child).close()
    fabric.control.remove_context(parent.cid)
    stranger = fabric.guest(parent.cid)
    address = stranger.cid, 7171
    with vsockets.create_server(address, context=stranger), pytest.raises(OSError) as caught:
        vsockets.create_connection(address, context=child)
    assert caught.value.errno == errno.EHOSTUNREACH
