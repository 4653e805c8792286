"""Descriptors in messages (SCM_RIGHTS): the library's sockets refuse them, from Linux 6.16 on.

Closing one can block its receiver as long as the sender likes, so a service would wait for it.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import pytest

import vsockets
from vsockets import Attachment
from vsockets._linux.sockets import HAS_PASSRIGHTS, SO_PASSRIGHTS
from vsockets.testing import PrivateFabric

from .raw_client import (
    adopt,
    ask,
    ask_for_route,
    bind,
    connect,
    enter,
    listen,
    send_with,
    unix_datagrams,
)

STREAM, SEQPACKET, DATAGRAM = socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM

pytestmark = pytest.mark.skipif(not HAS_PASSRIGHTS, reason="takes Linux 6.16")


@pytest.fixture
def host(vsock_fabric: PrivateFabric) -> Attachment:
    return vsock_fabric.host


@pytest.fixture
def guest(vsock_fabric: PrivateFabric) -> Attachment:
    return vsock_fabric.guest()


@contextlib.contextmanager
def established(
    server_in: Attachment, client_in: Attachment, kind: int = STREAM
) -> Iterator[tuple[vsockets.socket, vsockets.socket]]:
    """Yield the connecting and the accepting end."""
    with (
        vsockets.create_server((server_in.cid, 5000), type=kind, context=server_in) as server,
        vsockets.socket(type=kind, context=client_in) as client,
    ):
        client.connect((server_in.cid, 5000))
        with server.accept()[0] as accepted:
            yield client, accepted


def carries(sender: socket.socket, receiver: socket.socket) -> bool:
    """Return whether a descriptor sent with a byte arrives; the byte arrives in any case."""
    try:
        send_with(sender, b"x", [0])
    except PermissionError:
        sender.send(b"x")
        assert receiver.recv(10) == b"x"
        return False
    data, fds, _, _ = socket.recv_fds(receiver, 10, 1)
    assert data == b"x"
    for fd in fds:
        os.close(fd)
    return bool(fds)


@pytest.mark.parametrize("side", ["host", "guest"])
def test_streams_carry_none(host: Attachment, guest: Attachment, side: str) -> None:
    places = (host, guest) if side == "host" else (guest, host)
    with established(*places) as (client, accepted):
        assert not carries(client, accepted)
        assert not carries(accepted, client)


def test_streams_of_a_polling_client_carry_none(host: Attachment, guest: Attachment) -> None:
    with (
        vsockets.create_server((2, 5000), context=host) as server,
        vsockets.socket(context=guest) as client,
    ):
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.connect((2, 5000))
        with server.accept()[0] as accepted:
            client.setblocking(True)
            assert not carries(client, accepted)
            assert not carries(accepted, client)


def test_a_program_cannot_send_them_ahead(host: Attachment) -> None:
    """Not even before its request, or with it."""
    with enter(host) as server, enter(host) as client:
        ask(server, bind(5000))
        ask(server, listen())
        for data in (b"x", connect(2, 5000).encode()):
            with pytest.raises(PermissionError):
                send_with(client, data, [0])
        assert ask(client, connect(2, 5000)).status == 0


def test_a_receiver_that_asks_for_them_gets_them(host: Attachment, guest: Attachment) -> None:
    """Both ends have to agree: it is an option of the receiving socket."""
    with established(host, guest) as (client, accepted):
        socket.socket.setsockopt(accepted, socket.SOL_SOCKET, SO_PASSRIGHTS, 1)
        assert carries(client, accepted)


def test_a_socket_listens_after_a_refused_connect(host: Attachment, guest: Attachment) -> None:
    """The descriptors of its connections arrive."""
    with vsockets.socket(context=host) as server:
        with pytest.raises(ConnectionResetError):
            server.connect((2, 4999))
        server.bind((2, 5000))
        server.listen()
        with (
            vsockets.create_connection((2, 5000), context=guest) as client,
            server.accept()[0] as accepted,
        ):
            client.send(b"x")
            assert accepted.recv(10) == b"x"


@pytest.mark.parametrize("side", ["host", "guest"])
def test_sequenced_packets_carry_none(host: Attachment, guest: Attachment, side: str) -> None:
    places = (host, guest) if side == "host" else (guest, host)
    with established(*places, SEQPACKET) as (client, accepted):
        assert not carries(client, accepted)
        assert not carries(accepted, client)


def test_sequenced_packets_of_a_polling_client_carry_none(
    host: Attachment, guest: Attachment
) -> None:
    with (
        vsockets.create_server((2, 5000), type=SEQPACKET, context=host) as server,
        vsockets.socket(type=SEQPACKET, context=guest) as client,
    ):
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.connect((2, 5000))
        with server.accept()[0] as accepted:
            client.setblocking(True)
            assert not carries(client, accepted)
            assert not carries(accepted, client)


def test_datagrams_carry_none(host: Attachment, guest: Attachment) -> None:
    with unix_datagrams() as receiver, unix_datagrams() as sender:
        assert adopt(host, receiver, 5000).status == 0
        with ask_for_route(guest, sender, (2, 5000)) as route:
            assert not carries(route, receiver)
        assert sender.getsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS) == 0
