"""Datagram requests with anything but a datagram socket of the program's own.

Each test's fixture also checks that others are served promptly, during the abuse and after it, that
vsockd has no more descriptors at the end than at the start, and that it logs no error.
"""

from __future__ import annotations

import errno
import os
import socket

import pytest

import vsockets
from vsockets.protocol import RECORD_SIZE, Record, Request
from vsockets.testing import PrivateFabric

from .raw_client import (
    ANY,
    PROMPT,
    SOCKET_TYPES,
    adopt,
    ask,
    ask_for_route,
    assert_serves,
    bind,
    bind_datagram,
    enter,
    guest_of,
    has_ended,
    paused,
    route,
    send_with,
)

STREAM, SEQPACKET = socket.SOCK_STREAM, socket.SOCK_SEQPACKET
both_types = pytest.mark.parametrize("sock_type", SOCKET_TYPES)


@pytest.mark.parametrize("request_", [bind_datagram(5000), route(2, 5000)])
class TestDatagramRequests:
    def test_a_missing_descriptor_is_rejected(
        self, shared_fabric: PrivateFabric, request_: Request
    ) -> None:
        with enter(shared_fabric.host, SEQPACKET) as sock:
            sock.send(request_.encode())
            assert has_ended(sock)

    def test_a_pipe_is_rejected(self, shared_fabric: PrivateFabric, request_: Request) -> None:
        reader, writer = os.pipe()
        with enter(shared_fabric.host, SEQPACKET) as sock:
            send_with(sock, request_.encode(), [writer])
            assert has_ended(sock)
        os.close(writer)
        assert os.read(reader, 1) == b""
        os.close(reader)

    @pytest.mark.parametrize("kind", [STREAM, SEQPACKET])
    def test_a_connected_socket_is_rejected(
        self, shared_fabric: PrivateFabric, request_: Request, kind: int
    ) -> None:
        mine, theirs = socket.socketpair(socket.AF_UNIX, kind)
        mine.settimeout(PROMPT)
        with enter(shared_fabric.host, SEQPACKET) as sock:
            send_with(sock, request_.encode(), [theirs.fileno()])
            assert has_ended(sock)
        theirs.close()
        assert mine.recv(1) == b""
        mine.close()

    def test_an_internet_socket_is_rejected(
        self, shared_fabric: PrivateFabric, request_: Request
    ) -> None:
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
            enter(shared_fabric.host, SEQPACKET) as sock,
        ):
            send_with(sock, request_.encode(), [udp.fileno()])
            assert has_ended(sock)

    def test_a_folder_is_rejected(self, shared_fabric: PrivateFabric, request_: Request) -> None:
        folder = os.open("/", os.O_PATH)
        with enter(shared_fabric.host, SEQPACKET) as sock:
            send_with(sock, request_.encode(), [folder])
            assert has_ended(sock)
        os.close(folder)

    def test_a_bound_socket_is_refused(
        self, shared_fabric: PrivateFabric, request_: Request
    ) -> None:
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as taken,
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver,
            enter(shared_fabric.host, SEQPACKET) as sock,
        ):
            assert adopt(shared_fabric.host, receiver, 5000).status == 0
            taken.bind("")  # the kernel picks one
            send_with(sock, request_._replace(local_port=5001).encode(), [taken.fileno()])
            assert Record.decode(sock.recv(RECORD_SIZE)).status == errno.EINVAL

    def test_all_descriptors_but_the_first_are_ignored(
        self, shared_fabric: PrivateFabric, request_: Request
    ) -> None:
        reader, writer = os.pipe()
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
            enter(shared_fabric.host, SEQPACKET) as sock,
        ):
            # The first is the socket; the others are not even received.
            send_with(sock, request_.encode(), [datagrams.fileno(), writer, writer])
            assert Record.decode(sock.recv(RECORD_SIZE)).status in (0, errno.ECONNREFUSED)
            os.close(writer)
            assert os.read(reader, 1) == b""
        os.close(reader)

    def test_closed_before_vsockd_reads_the_request(
        self, shared_fabric: PrivateFabric, request_: Request
    ) -> None:
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver,
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender,
            enter(shared_fabric.host, SEQPACKET) as known,
        ):
            assert adopt(shared_fabric.host, receiver, 5000).status == 0
            assert ask(known, bind()).status == 0
            request = request_._replace(local_port=ANY)
            with paused(shared_fabric.pid):
                for sock in (enter(shared_fabric.host, SEQPACKET), known):
                    send_with(sock, request.encode(), [sender.fileno()])
                    sock.close()
            assert_serves(shared_fabric)


def test_a_socket_of_another_context(shared_fabric: PrivateFabric) -> None:
    """A socket bound in one context is unknown in any other, also with its descriptor."""
    guest = guest_of(shared_fabric)
    with vsockets.socket(type=socket.SOCK_DGRAM, context=shared_fabric.host) as datagrams:
        datagrams.bind((2, 5000))
        with enter(guest, SEQPACKET) as sock:
            send_with(sock, route(2, 5000).encode(), [datagrams.fileno()])
            assert Record.decode(sock.recv(RECORD_SIZE)).status == errno.EINVAL


def test_a_route_is_for_its_destination_only(shared_fabric: PrivateFabric) -> None:
    """A program cannot reverse a route, or change its name."""
    with (
        vsockets.socket(type=socket.SOCK_DGRAM, context=shared_fabric.host) as receiver,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind((2, 5000))
        assert adopt(shared_fabric.host, sender, 5001).status == 0
        with ask_for_route(shared_fabric.host, sender, (2, 5000)) as made:
            with pytest.raises(OSError, match="Invalid argument"):
                made.bind("\0vsock:2:1:1")
            made.send(b"from me")
            assert receiver.recvfrom(100) == (b"from me", (2, 5001))
