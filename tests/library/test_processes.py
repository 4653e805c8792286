"""Descriptors of sockets across dup, detach, fork, exec, and between processes."""

from __future__ import annotations

import errno
import os
import socket as stdlib
import subprocess
import sys
from typing import Any

import pytest

import vsockets
from vsockets.testing import PrivateFabric

from .conftest import ANY, Pair


def addresses(sock: vsockets.socket) -> list[Any]:
    def ask(call: Any) -> Any:
        try:
            return call()
        except OSError as error:
            return error.errno

    option = vsockets.SO_VM_SOCKETS_BUFFER_SIZE
    return [
        sock.type,
        sock.getsockname(),
        ask(sock.getpeername),
        ask(sock.peer_credentials),
        sock.getsockopt(vsockets.AF_VSOCK, option) if sock.type != stdlib.SOCK_DGRAM else None,
        sock.getsockopt(stdlib.SOL_SOCKET, stdlib.SO_ACCEPTCONN),
    ]


def test_dup(pair: Pair) -> None:
    for sock in (pair.server, pair.client, pair.accepted):
        with sock.dup() as twin:
            assert twin.fileno() != sock.fileno()
            assert addresses(twin) == addresses(sock)
            assert twin.gettimeout() == sock.gettimeout()
            assert not twin.get_inheritable()
    twin = pair.client.dup()
    pair.client.close()
    twin.send(b"still open")
    assert pair.accepted.recv(100) == b"still open"
    twin.close()
    assert pair.accepted.recv(100) == b""


def test_detach_and_fileno(pair: Pair) -> None:
    for name in ("server", "client", "accepted"):
        sock = getattr(pair, name)
        expected = addresses(sock)
        context = pair.guest if name == "client" else pair.host
        fd = sock.detach()
        assert sock.fileno() == -1
        again = vsockets.socket(type=-1, fileno=fd, context=context)
        again.settimeout(10)  # the descriptor's timeout mode must have no effect
        assert addresses(again) == expected
        setattr(pair, name, again)
    pair.client.send(b"as before")
    assert pair.accepted.recv(100) == b"as before"
    with vsockets.socket(type=pair.server.type, context=pair.guest) as another:
        another.connect(pair.server.getsockname())
        pair.server.accept()[0].close()


def test_detach_and_fileno_of_bound_and_datagram_sockets(host: vsockets.Attachment) -> None:
    for sock_type in (stdlib.SOCK_STREAM, stdlib.SOCK_DGRAM):
        sock = vsockets.socket(type=sock_type, context=host)
        sock.bind(ANY)
        expected = addresses(sock)
        with vsockets.socket(type=-1, fileno=sock.detach(), context=host) as again:
            assert addresses(again) == expected


def test_descriptor_of_a_new_socket_can_be_detached(host: vsockets.Attachment) -> None:
    fd = vsockets.socket(context=host).detach()
    with vsockets.socket(fileno=fd, context=host) as again:
        again.bind(ANY)
        again.listen()


def test_connected_socket_of_another_library(host: vsockets.Attachment) -> None:
    one, other = stdlib.socketpair()
    with other, vsockets.socket(fileno=one.detach(), context=host) as sock:
        sock.send(b"x")
        assert other.recv(1) == b"x"
        with pytest.raises(OSError) as caught:
            sock.getpeername()
        assert caught.value.errno == errno.ENOTCONN


def test_fork(pair: Pair) -> None:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            pair.accepted.sendall(repr(addresses(pair.accepted)[1:3]).encode())
            accepted, _ = pair.server.accept()
            accepted.sendall(b"accepted in the child")
            status = 0
        finally:
            os._exit(status)
    expected = repr(addresses(pair.accepted)[1:3]).encode()
    assert pair.client.recv(1000) == expected
    with vsockets.socket(type=pair.client.type, context=pair.guest) as another:
        another.settimeout(10)
        another.connect(pair.server.getsockname())
        assert another.recv(100) == b"accepted in the child"
    assert os.waitpid(pid, 0)[1] == 0


def test_port_is_held_until_the_last_copy_is_closed(
    host: vsockets.Attachment,
) -> None:
    reader, writer = os.pipe()
    server = vsockets.create_server(ANY, context=host)
    address = server.getsockname()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    server.close()
    with vsockets.socket(context=host) as rival:
        with pytest.raises(OSError) as caught:
            rival.bind(address)
        assert caught.value.errno == errno.EADDRINUSE
        os.close(writer)
        os.waitpid(pid, 0)
        rival.bind(address)


CHILD = """
import socket, sys, vsockets
fd, kind = int(sys.argv[1]), sys.argv[2]
sock = vsockets.socket(fileno=fd, type=-1)
if kind == "listener":
    accepted, peer = sock.accept()
    accepted.sendall(repr((sock.getsockname(), peer)).encode())
elif kind == "stream":
    sock.sendall(repr((sock.getsockname(), sock.getpeername())).encode())
else:
    data, source = sock.recvfrom(100)
    sock.sendto(repr((sock.getsockname(), source)).encode(), source)
"""


@pytest.mark.parametrize("kind", ["listener", "stream", "datagram"])
def test_exec(vsock_fabric: PrivateFabric, kind: str) -> None:
    host, guest = vsock_fabric.host, vsock_fabric.guest()
    sock_type = stdlib.SOCK_DGRAM if kind == "datagram" else stdlib.SOCK_STREAM
    client = vsockets.socket(type=sock_type, context=guest)
    client.settimeout(20)
    passed = vsockets.socket(type=sock_type, context=host)
    passed.bind(ANY)
    address = passed.getsockname()
    if kind == "datagram":
        client.sendto(b"hello", address)
    else:
        passed.listen()
        client.connect(address)
        if kind == "stream":
            listener, (passed, _) = passed, passed.accept()
            listener.close()
    with client, passed:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(passed.fileno()), kind],
            pass_fds=[passed.fileno()],
            env={**vsock_fabric.environment(host), "PYTHONPATH": _package_root()},
        )
        passed.close()
        expected = repr((address, client.getsockname())).encode()
        assert client.recv(1000) == expected
        assert child.wait(20) == 0


def _package_root() -> str:
    return os.path.dirname(os.path.dirname(vsockets.__file__))


def test_passing_a_socket_over_a_unix_socket(pair: Pair) -> None:
    one, other = stdlib.socketpair()
    with one, other:
        stdlib.send_fds(one, [b"x"], [pair.accepted.fileno()])
        _, fds, _, _ = stdlib.recv_fds(other, 1, 1)
        received = vsockets.socket(type=pair.accepted.type, fileno=fds[0], context=pair.host)
        with received:
            assert received.getpeername() == pair.client.getsockname()
            received.send(b"from the copy")
            assert pair.client.recv(100) == b"from the copy"
