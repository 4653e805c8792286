"""Requests that one process writes on another's connection: they have the rights of both."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import vsockets
from vsockets.protocol import RECORD_SIZE, Op, Record, Request, RequestFlag
from vsockets.testing import PrivateFabric

from .raw_client import (
    PROMPT,
    SOCKET_TYPES,
    ask,
    bind,
    bind_datagram,
    connect,
    enter,
    listen,
    send_with,
    unix_datagrams,
)
from .test_device_link import Device
from .users import CAP_NET_ADMIN, NOBODY, as_administrator, as_root, has_capability, user

pytestmark = as_root
both_types = pytest.mark.parametrize("sock_type", SOCKET_TYPES)

OTHER = NOBODY - 1
#: A group that no user belongs to.
CREW = 54_321
PR_SET_DUMPABLE = 4
LIBC = ctypes.CDLL(None)
TRUSTED_BY_9 = Request(Op.LOCAL_CID, peer_cid=9)
CAPTURE = Request(Op.CAPTURE, peer_cid=9, size=100)


@contextlib.contextmanager
def written(
    sock: socket.socket,
    request: Request,
    uid: int = NOBODY,
    groups: tuple[int, ...] = (),
    descriptors: tuple[int, ...] = (),
) -> Iterator[int]:
    """Have a process of ``uid`` write ``request`` and continue; yield its id."""
    here, there = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            here.close()
            os.setgroups(groups)
            os.setgid(uid)
            os.setuid(uid)
            LIBC.prctl(PR_SET_DUMPABLE, 1)  # as if it had been executed by its user
            send_with(sock, request.encode(), descriptors)
            there.recv(1)
        finally:
            os._exit(0)
    there.close()
    with here:
        try:
            yield pid
        finally:
            here.close()
            os.waitpid(pid, 0)


def ask_as(
    sock: socket.socket,
    request: Request,
    uid: int = NOBODY,
    groups: tuple[int, ...] = (),
    descriptors: tuple[int, ...] = (),
) -> Record:
    with written(sock, request, uid, groups, descriptors):
        return Record.decode(sock.recv(RECORD_SIZE))


def ask_naming(sock: socket.socket, request: Request, pid: int, uid: int, gid: int) -> Record:
    """Send a request in the name of another process, as root may."""
    credentials = struct.pack("iII", pid, uid, gid)
    sock.sendmsg([request.encode()], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials)])
    return Record.decode(sock.recv(RECORD_SIZE))


@both_types
def test_a_connection_of_roots_gives_no_reserved_port(
    fabric: PrivateFabric, sock_type: int
) -> None:
    with enter(fabric.host, sock_type) as sock:
        assert ask_as(sock, bind(700)).status == errno.EACCES
        assert ask(sock, bind(700)).status == 0


def test_nor_for_a_datagram_socket(fabric: PrivateFabric) -> None:
    with enter(fabric.host, socket.SOCK_SEQPACKET) as sock, unix_datagrams() as datagrams:
        fds = (datagrams.fileno(),)
        assert ask_as(sock, bind_datagram(700), descriptors=fds).status == errno.EACCES


@both_types
def test_after_a_refused_connect(fabric: PrivateFabric, sock_type: int) -> None:
    """As in finding M8: vsockd keeps serving the client after a refusal."""
    with enter(fabric.host, sock_type) as sock:
        assert ask(sock, connect(2, 5000)).status == errno.ECONNRESET
        assert ask_as(sock, bind(700)).status == errno.EACCES


def test_after_a_guest_has_refused(fabric: PrivateFabric) -> None:
    device = Device(fabric, fabric.guest(9))
    with device.link, enter(fabric.host) as sock:
        sock.send(connect(9, 80).encode())
        device.refuse()
        assert Record.decode(sock.recv(RECORD_SIZE)).status == errno.ECONNRESET
        assert ask_as(sock, bind(700)).status == errno.EACCES
        # What root writes is root's again, as soon as the socket is vsockd's again.
        assert ask(sock, bind(700)).status == 0


@both_types
def test_a_bound_socket_of_roots_gives_no_captures(fabric: PrivateFabric, sock_type: int) -> None:
    device = Device(fabric, fabric.guest(9))
    with device.link, enter(fabric.host, sock_type) as sock:
        assert ask(sock, bind(5000)).status == 0
        assert ask_as(sock, CAPTURE).status == errno.EACCES
        assert ask(sock, CAPTURE).status == 0


def test_a_connection_of_roots_gives_no_trust(fabric: PrivateFabric) -> None:
    fabric.guest(9, profile="restricted", owner=OTHER)

    def is_trusted(uid: int, groups: tuple[int, ...] = ()) -> bool:
        with enter(fabric.host) as sock:
            return bool(ask_as(sock, TRUSTED_BY_9, uid, groups).flags & RequestFlag.TRUSTED_STREAM)

    assert not is_trusted(NOBODY)
    assert is_trusted(OTHER)
    for who in (f"group = {CREW}", f"user = {NOBODY}\ngroup = {CREW}"):
        (fabric.configuration / "grants.toml").write_text(
            f"[[grant]]\n{who}\nstream_vsocket_trusted = true\n"
        )
        fabric.control.reload()
        assert is_trusted(NOBODY, (1, CREW))
        assert not is_trusted(NOBODY, (1,))


def test_a_grant_to_an_executable_is_for_the_one_that_wrote(
    fabric: PrivateFabric, tmp_path: Path
) -> None:
    fabric.guest(9, profile="restricted", owner=OTHER)
    for executable, trusted in (("/proc/self/exe", True), ("/bin/true", False)):
        (fabric.configuration / "grants.toml").write_text(
            f'[[grant]]\nuser = {NOBODY}\nexecutable = "{os.path.realpath(executable)}"\n'
            "stream_vsocket_trusted = true\n"
        )
        fabric.control.reload()
        with enter(fabric.host) as sock:
            assert bool(ask_as(sock, TRUSTED_BY_9).flags & RequestFlag.TRUSTED_STREAM) == trusted


@both_types
def test_roots_writes_on_a_users_connection_have_the_users_rights(
    fabric: PrivateFabric, sock_type: int
) -> None:
    """A privileged program can be tricked into writing anything to its standard output."""
    device = Device(fabric, fabric.guest(9))
    with device.link, enter(fabric.host) as server:
        ask(server, bind(5000))
        ask(server, listen())
        with user(NOBODY):
            sock = enter(fabric.host, sock_type)
        with sock:
            assert ask(sock, bind(700)).status == errno.EACCES
        with user(NOBODY):
            sock = enter(fabric.host, sock_type)
        with sock:
            assert ask(sock, CAPTURE).status == errno.EACCES
        if sock_type == socket.SOCK_STREAM:
            with user(NOBODY):
                sock = enter(fabric.host, sock_type)
            with sock:
                assert ask(sock, connect(2, 5000)).status == 0
                assert Record.decode(server.recv(RECORD_SIZE)).uid == NOBODY


@pytest.mark.parametrize(("connects", "writes"), [(NOBODY, OTHER), (OTHER, NOBODY)])
def test_two_users_have_no_right_in_common(
    fabric: PrivateFabric, connects: int, writes: int
) -> None:
    fabric.guest(9, profile="restricted", owner=OTHER)
    with enter(fabric.host) as server:
        ask(server, bind(5000))
        ask(server, listen())
        with user(connects):
            sock = enter(fabric.host)
        with sock:
            assert not ask_as(sock, TRUSTED_BY_9, writes).flags & RequestFlag.TRUSTED_STREAM
        with user(connects):
            sock = enter(fabric.host)
        with sock, written(sock, connect(2, 5000), writes) as pid:
            assert Record.decode(sock.recv(RECORD_SIZE)).status == 0
            announced = Record.decode(server.recv(RECORD_SIZE))
            assert (announced.pid, announced.uid, announced.gid) == (pid, 2**32 - 1, 2**32 - 1)


@as_administrator
@both_types
def test_root_requests_in_the_name_of_a_program(fabric: PrivateFabric, sock_type: int) -> None:
    fabric.guest(9, profile="restricted", owner=OTHER)
    with enter(fabric.host) as server, enter(fabric.host, sock_type) as unused:
        ask(server, bind(5000))
        ask(server, listen())
        with written(unused, Request(Op.UPDATE)) as pid:  # a process of user nobody
            with enter(fabric.host, sock_type) as sock:
                assert ask_naming(sock, bind(700), pid, NOBODY, NOBODY).status == errno.EACCES
                if sock_type == socket.SOCK_STREAM:
                    answer = ask_naming(sock, connect(2, 5000), pid, NOBODY, NOBODY)
                    assert answer.status == 0
                    announced = Record.decode(server.recv(RECORD_SIZE))
                    told = announced.pid, announced.uid, announced.gid
                    assert told == (pid, NOBODY, NOBODY)
            with enter(fabric.host, sock_type) as sock:
                flags = ask_naming(sock, TRUSTED_BY_9, pid, NOBODY, NOBODY).flags
                assert not flags & RequestFlag.TRUSTED_STREAM
        # Its own rights it has.
        with enter(fabric.host, sock_type) as sock:
            flags = ask_naming(sock, TRUSTED_BY_9, os.getpid(), 0, 0).flags
            assert bool(flags & RequestFlag.TRUSTED_STREAM) == has_capability(CAP_NET_ADMIN)


@both_types
def test_streams_carry_no_credentials(fabric: PrivateFabric, sock_type: int) -> None:
    """Once it is a stream, neither end receives the writer's credentials."""
    with enter(fabric.host, sock_type) as server, enter(fabric.host, sock_type) as client:
        ask(server, bind(5000))
        ask(server, listen())
        assert ask(client, connect(2, 5000)).status == 0
        _, fds, _, _ = socket.recv_fds(server, RECORD_SIZE, 1)
        with socket.socket(fileno=fds[0]) as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED) == 0
            client.send(b"x")
            assert accepted.recvmsg(1, 100) == (b"x", [], 0, None)


def test_a_library_socket_in_a_childs_hands(fabric: PrivateFabric) -> None:
    """Servers bind and then start their workers: what needs no right works in those."""
    with vsockets.socket(context=fabric.host) as server:
        server.bind((2, 700))
        here, there = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            try:
                os.setgid(NOBODY)
                os.setuid(NOBODY)
                server.listen()
                there.send(b"l")
                server.settimeout(PROMPT)
                connection, _ = server.accept()
                connection.sendall(b"hello")
            finally:
                os._exit(0)
        assert here.recv(1) == b"l"
        with vsockets.create_connection((2, 700), context=fabric.host) as connection:
            assert connection.recv(5) == b"hello"
        os.waitpid(pid, 0)
        here.close()
        there.close()
