"""A datagram shows its true source: attacks by its sender.

Every test is one attack by programs of guest 3 that talk to vsockd, and to the kernel, without the
library.  The source that the receiver, a program of the host, gets must be true.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator

import pytest

import vsockets
from vsockets import VMADDR_CID_LOCAL, Attachment
from vsockets._linux.sockets import HAS_PASSRIGHTS
from vsockets.protocol import RECORD_SIZE, Op, Record, Request, Role, encode_source
from vsockets.testing import PrivateFabric

from .raw_client import (
    ANY,
    GUEST,
    adopt,
    ask_for_route,
    ask_once,
    bind_datagram,
    cookie_of,
    enter,
    guest_of,
    route,
    send_with,
    unix_datagrams,
)

SEQPACKET, DATAGRAM = socket.SOCK_SEQPACKET, socket.SOCK_DGRAM

#: Disconnects a datagram socket: connect(2).
UNSPECIFIED = struct.pack("H14x", socket.AF_UNSPEC)


@pytest.fixture
def guest(shared_fabric: PrivateFabric) -> Attachment:
    return guest_of(shared_fabric)


@pytest.fixture
def receiver(shared_fabric: PrivateFabric) -> Iterator[vsockets.socket]:
    """Yield the host's service on port 5000.  A test must have received every datagram."""
    with vsockets.socket(type=DATAGRAM, context=shared_fabric.host) as sock:
        sock.bind((2, 5000))
        sock.setblocking(False)
        yield sock
        with pytest.raises(BlockingIOError):
            sock.recvfrom(100)


def ask_with(context: Attachment, request: Request, sock: socket.socket) -> Record:
    """Return vsockd's reply to a datagram request; close a route that comes with it."""
    with enter(context, SEQPACKET) as door:
        send_with(door, request.encode(), [sock.fileno()])
        return Record.decode(door.recv(RECORD_SIZE))


# Contents of requests


@pytest.mark.parametrize("cid", [0, 2, 4], ids=["hypervisor", "host", "guest 4"])
def test_another_cid_in_the_request(guest: Attachment, receiver: vsockets.socket, cid: int) -> None:
    for request in (bind_datagram(5001), route(2, 5000)):
        with unix_datagrams() as sender:
            answer = ask_with(guest, request._replace(local_cid=cid), sender)
            assert answer.status == errno.EADDRNOTAVAIL


@pytest.mark.parametrize("bound_before", [False, True])
def test_the_local_cid_as_the_source(
    guest: Attachment, receiver: vsockets.socket, bound_before: bool
) -> None:
    """CID 1 is local to each context: to the host (1, 5001) would be a program of the host."""
    local = {"local_cid": VMADDR_CID_LOCAL, "local_port": 5001}
    with unix_datagrams() as sender:
        if bound_before:
            assert ask_with(guest, bind_datagram()._replace(**local), sender).status == 0
        answer = ask_with(guest, route(2, 5000)._replace(**local), sender)
        assert answer.status == errno.EHOSTUNREACH


def test_another_port_in_the_request(guest: Attachment, receiver: vsockets.socket) -> None:
    """A bound socket keeps its port."""
    with unix_datagrams() as sender:
        assert adopt(guest, sender, 5001).local == (GUEST, 5001)
        with enter(guest, SEQPACKET) as door:
            request = route(2, 5000)._replace(local_cid=GUEST, local_port=6000)
            send_with(door, request.encode(), [sender.fileno()])
            data, (fd,), _, _ = socket.recv_fds(door, RECORD_SIZE, 1)
        assert Record.decode(data).local == (GUEST, 5001)
        with socket.socket(fileno=fd) as way:
            way.send(b"x")
        assert receiver.recvfrom(100) == (b"x", (GUEST, 5001))


def test_a_port_of_another_program(guest: Attachment, receiver: vsockets.socket) -> None:
    with unix_datagrams() as holder, unix_datagrams() as thief:
        assert adopt(guest, holder, 5001).status == 0
        for request in (bind_datagram(5001), route(2, 5000)._replace(local_port=5001)):
            assert ask_with(guest, request, thief).status == errno.EADDRINUSE


def test_a_replayed_request(guest: Attachment, receiver: vsockets.socket) -> None:
    """The bytes of another client's request concern the socket that comes with them."""
    request = bind_datagram(5001)
    with unix_datagrams() as first, unix_datagrams() as replayed:
        assert ask_with(guest, request, first).local == (GUEST, 5001)
        assert ask_with(guest, request, replayed).status == errno.EADDRINUSE
        with ask_for_route(guest, replayed, (2, 5000)) as way:
            way.send(b"x")
    data, source = receiver.recvfrom(100)
    assert data == b"x" and source[0] == GUEST and source[1] != 5001


@pytest.mark.parametrize("op", [Op.QUERY, Op.LOCAL_CID, Op.ROUTE])
def test_the_cookie_of_a_socket_of_the_host(
    shared_fabric: PrivateFabric, guest: Attachment, receiver: vsockets.socket, op: Op
) -> None:
    cookie = cookie_of(receiver)
    inode = os.fstat(receiver.fileno()).st_ino
    request = Request(op, 0, ANY, ANY, 2, 5000, cookie=cookie, inode=inode)
    if op is Op.QUERY:
        assert ask_once(shared_fabric.host, request).role == Role.DATAGRAM
        assert ask_once(guest, request).status == errno.ENOTCONN
    elif op is Op.LOCAL_CID:
        assert ask_once(guest, request).local_cid == GUEST
    else:
        with unix_datagrams() as sender:
            assert ask_with(guest, request, sender).local_cid == GUEST


# Descriptors that were passed


def test_a_bound_socket_of_the_host(guest: Attachment, receiver: vsockets.socket) -> None:
    """A bound socket keeps its context: a guest that receives it cannot send in its name."""
    for request in (bind_datagram(), route(2, 5000), bind_datagram(5000)):
        with socket.socket(fileno=os.dup(receiver.fileno())) as passed:
            assert ask_with(guest, request, passed).status == errno.EINVAL


def test_a_socket_of_another_guest(
    shared_fabric: PrivateFabric, guest: Attachment, receiver: vsockets.socket
) -> None:
    other = shared_fabric.guest(4)
    with unix_datagrams() as theirs:
        assert adopt(other, theirs, 5001).local == (4, 5001)
        for request in (bind_datagram(5001), route(2, 5000)):
            assert ask_with(guest, request, theirs).status == errno.EINVAL
    shared_fabric.control.remove_context(4)


def test_a_route_that_was_passed_ends_with_its_port(
    shared_fabric: PrivateFabric, guest: Attachment, receiver: vsockets.socket
) -> None:
    """A route has its socket's source address until the port is assigned to another socket."""
    with unix_datagrams() as owner:
        assert adopt(guest, owner, 5001).status == 0
        way = ask_for_route(guest, owner, (2, 5000))
    with way, unix_datagrams() as successor:
        assert adopt(guest, successor, 5001).local == (GUEST, 5001)
        with pytest.raises(BrokenPipeError):
            way.send(b"from the one before")


def test_an_own_connected_socket(guest: Attachment, receiver: vsockets.socket) -> None:
    """A socket that is connected already gets an address, and its peer keeps it."""
    mine, peer = socket.socketpair(socket.AF_UNIX, DATAGRAM)
    with mine, peer:
        assert adopt(guest, mine, 5001).local == (GUEST, 5001)
        with ask_for_route(guest, mine, (2, 5000)) as way:
            way.send(b"x")
        assert receiver.recvfrom(100) == (b"x", (GUEST, 5001))


# Names in the kernel


@pytest.mark.parametrize(
    "name",
    [b"\0vsock:2:5001:1", encode_source((2, 5001), 16 * "0", 2**63), b"\0vsock:0:1:ffff"],
    ids=["of the host", "of the host, long", "of the hypervisor"],
)
def test_a_name_that_looks_like_an_address(
    guest: Attachment, receiver: vsockets.socket, name: bytes
) -> None:
    """Any program may bind the name; only vsockd connects a socket to a receiver."""
    with unix_datagrams() as liar:
        liar.bind(name)
        for request in (bind_datagram(), route(2, 5000)):
            assert ask_with(guest, request, liar).status == errno.EINVAL


def test_sending_to_what_the_kernel_calls_the_receiver(
    shared_fabric: PrivateFabric, guest: Attachment, receiver: vsockets.socket
) -> None:
    with socket.socket(fileno=os.dup(receiver.fileno())) as copy:
        name = copy.getsockname()
    with unix_datagrams() as sender:
        for spelled in (
            name,
            f"\0{name}",
            os.fspath(shared_fabric.folder / "private" / os.fspath(name)),
            f"/proc/self/fd/{receiver.fileno()}",
            f"/proc/{os.getpid()}/fd/{receiver.fileno()}",
        ):
            with pytest.raises(OSError) as refusal:
                sender.sendto(b"x", spelled)
            assert refusal.value.errno in (errno.ENOENT, errno.ECONNREFUSED)


def test_sending_to_the_name_of_a_route(
    guest: Attachment, receiver: vsockets.socket, shared_fabric: PrivateFabric
) -> None:
    """The receiver of a datagram knows the route's name, and cannot use it."""
    with unix_datagrams() as mine:
        assert adopt(guest, mine, 5001).status == 0
        with vsockets.socket(type=DATAGRAM, context=shared_fabric.host) as host:
            host.bind((2, 5002))
            host.sendto(b"x", (GUEST, 5001))
            _, name = mine.recvfrom(100)
            with unix_datagrams() as sender, pytest.raises(PermissionError):
                sender.sendto(b"back", name)


def test_a_route_that_is_disconnected_and_connected_again(
    guest: Attachment, receiver: vsockets.socket
) -> None:
    """A route can lose its destination, and shows the same source on any other."""
    with unix_datagrams() as sender, unix_datagrams() as mine:
        mine.bind("")
        assert adopt(guest, sender, 5001).status == 0
        with ask_for_route(guest, sender, (2, 5000)) as way:
            name = way.getsockname()
            assert connect_raw(way, UNSPECIFIED) == 0
            with pytest.raises(OSError) as refusal:
                way.send(b"x")
            assert refusal.value.errno == errno.ENOTCONN
            with pytest.raises(OSError):
                way.bind("\0vsock:2:5000:1")
            way.connect(mine.getsockname())
            way.send(b"to myself")
            assert mine.recvfrom(100) == (b"to myself", name)
    assert name.startswith(b"\0vsock:3:5001:")


def test_a_reconnected_route_after_its_port_was_reassigned(
    guest: Attachment, receiver: vsockets.socket
) -> None:
    with unix_datagrams() as owner:
        assert adopt(guest, owner, 5001).status == 0
        way = ask_for_route(guest, owner, (2, 5000))
    with way, unix_datagrams() as successor, unix_datagrams() as mine:
        mine.bind("")
        assert connect_raw(way, UNSPECIFIED) == 0
        assert adopt(guest, successor, 5001).status == 0
        way.connect(mine.getsockname())
        with pytest.raises(BrokenPipeError):
            way.send(b"x")


def connect_raw(sock: socket.socket, address: bytes) -> int:
    """Call connect(2) with an address that Python does not support."""
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.connect(sock.fileno(), address, len(address)))


def test_bytes_that_look_like_a_record(guest: Attachment, receiver: vsockets.socket) -> None:
    """A datagram's source is sent beside its payload, never in it."""
    lie = Record(0, 0, 2, 5000, 2, 6000, Role.DATAGRAM).encode()
    with unix_datagrams() as sender:
        assert adopt(guest, sender, 5001).status == 0
        with ask_for_route(guest, sender, (2, 5000)) as way:
            if HAS_PASSRIGHTS:
                with pytest.raises(PermissionError):  # by the kernel: descriptors are refused
                    send_with(way, lie, [way.fileno()])
                way.send(lie)
            else:
                send_with(way, lie, [way.fileno()])
    assert receiver.recvfrom(1000) == (lie, (GUEST, 5001))
