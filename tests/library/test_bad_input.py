"""Misuse of sockets: each call raises a clear error, and the socket stays usable."""

from __future__ import annotations

import errno
import os
import socket as stdlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import vsockets
from vsockets import VMADDR_CID_ANY, VMADDR_CID_HOST, VMADDR_PORT_ANY
from vsockets.testing import PrivateFabric

from .conftest import ANY, Pair

ADDRESS_CALLS: dict[str, Callable[[vsockets.socket, Any], Any]] = {
    "bind": lambda sock, address: sock.bind(address),
    "connect": lambda sock, address: sock.connect(address),
    "connect_ex": lambda sock, address: sock.connect_ex(address),
}


@pytest.mark.parametrize("sock_type", [stdlib.SOCK_STREAM, stdlib.SOCK_DGRAM])
@pytest.mark.parametrize("call", ADDRESS_CALLS)
@pytest.mark.parametrize(
    "address", [None, 5, "2:5000", (2,), (2, 3, 4), ("2", 5), [2, 5], (2.0, 5)]
)
def test_invalid_addresses(
    host: vsockets.Attachment, sock_type: int, call: str, address: Any
) -> None:
    with vsockets.socket(type=sock_type, context=host) as sock:
        with pytest.raises(TypeError, match=r"\(cid, port\)|integers"):
            ADDRESS_CALLS[call](sock, address)
        if sock_type == stdlib.SOCK_DGRAM:
            with pytest.raises(TypeError):
                sock.sendto(b"x", address)
        sock.bind(ANY)


#: Binds, sends to and connects to each address with each type of socket; ``setup`` selects the
#: implementation of AF_VSOCK.
INTEGERS = """
import socket
{setup}
class Index:
    def __init__(self, number): self.number = number
    def __index__(self): return self.number
ANY = socket.VMADDR_CID_ANY
BIND = lambda sock, address: sock.bind(address)
CONNECT = lambda sock, address: sock.connect(address)
SEND = lambda sock, address: sock.sendto(b"", address)
def attempt(kind, call, address):
    with socket.socket(socket.AF_VSOCK, kind) as sock:
        try:
            call(sock, address)
            cid, port = sock.getsockname()
            return cid, port if port < 10000 else "free"
        except OSError as error:
            return error.errno
        except (TypeError, OverflowError) as error:
            return type(error).__name__
numbers = -1, 2**32 + 5000, -2**32 + 5001, 2**64 + 5002, Index(5003), Index(-1), True
numbers += 5.0, "5", None
for kind in socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM:
    for number in numbers:
        print(attempt(kind, BIND, (ANY, number)))
        print(attempt(kind, BIND, (number, 6000)))
        print(attempt(kind, CONNECT, (2, number)))
        print(attempt(kind, CONNECT, (number, 6000)))
        if kind == socket.SOCK_DGRAM:
            print(attempt(kind, SEND, (2, number)))
            print(attempt(kind, SEND, (number, 6000)))
"""


def test_integers_as_in_af_vsock_of_cpython(vsock_fabric: PrivateFabric) -> None:
    """The reference is CPython's own AF_VSOCK, in a supervised program without vsockets."""
    pytest.importorskip("click", reason="vsock needs click")

    def outcomes(setup: str) -> list[str]:
        done = vsock_fabric.run(
            vsock_fabric.guest(reserved_ports=True),
            [sys.executable, "-c", INTEGERS.format(setup=setup)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return str(done.stdout).splitlines()

    reference = outcomes("")
    assert outcomes("import vsockets; vsockets.install()") == [
        line.replace("(3, ", "(4, ") for line in reference
    ]
    assert reference[:2] == ["(3, 'free')", "(3, 6000)"]  # -1: any
    assert reference[4] == "(3, 5000)"  # 2**32 + 5000
    assert reference.count("TypeError") == 3 * 4 * 3 + 3 * 2


def expect(code: int, call: Any, *arguments: Any) -> None:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert caught.value.errno == code, caught.value


def test_binding(host: vsockets.Attachment, guest: vsockets.Attachment) -> None:
    with vsockets.socket(context=guest) as sock, vsockets.socket(context=guest) as other:
        expect(errno.EADDRNOTAVAIL, sock.bind, (VMADDR_CID_HOST, 5000))
        expect(errno.EADDRNOTAVAIL, sock.bind, (0, 5000))
        sock.bind((guest.cid, 5000))
        expect(errno.EINVAL, sock.bind, (guest.cid, 5001))
        expect(errno.EADDRINUSE, other.bind, (VMADDR_CID_ANY, 5000))
        other.bind((guest.cid, 5001))  # the refused call had no effect


def test_calls_in_the_wrong_state(host: vsockets.Attachment, guest: vsockets.Attachment) -> None:
    with vsockets.socket(context=host) as sock, open(os.devnull, "rb") as file:
        expect(errno.EINVAL, sock.listen)
        expect(errno.EINVAL, sock.accept)
        expect(errno.ENOTCONN, sock.getpeername)
        expect(errno.ENOTCONN, sock.peer_credentials)
        for call in (
            lambda: sock.recv(1),
            lambda: sock.recv_into(bytearray(1)),
            lambda: sock.recvmsg(1),
            lambda: sock.recvmsg_into([bytearray(1)]),
            lambda: sock.send(b"x"),
            lambda: sock.sendall(b"x"),
            lambda: sock.sendmsg([b"x"]),
            lambda: sock.sendfile(file),
            lambda: sock.shutdown(stdlib.SHUT_RDWR),
        ):
            expect(errno.ENOTCONN, call)
        sock.bind(ANY)
        expect(errno.ENOTCONN, sock.recv, 1)
        expect(errno.EINVAL, sock.accept)
        sock.listen()
        expect(errno.EINVAL, sock.connect, (VMADDR_CID_HOST, 1))
        expect(errno.EINVAL, sock.bind, ANY)
        expect(errno.ENOTCONN, sock.recv, 1)
        expect(errno.ENOTCONN, sock.send, b"x")
        # The listener is unaffected.
        with vsockets.create_connection(sock.getsockname(), context=guest):
            sock.accept()[0].close()


def test_established_stream_cannot_be_reused(pair: Pair) -> None:
    expect(errno.EISCONN, pair.client.connect, pair.server.getsockname())
    expect(errno.EISCONN, pair.accepted.connect, pair.server.getsockname())
    expect(errno.EINVAL, pair.client.bind, ANY)
    expect(errno.EINVAL, pair.client.listen)
    expect(errno.EINVAL, pair.client.accept)
    expect(errno.EISCONN, pair.client.sendto, b"x", pair.server.getsockname())
    expect(errno.EINVAL, pair.client.shutdown, 99)
    pair.client.send(b"as if nothing had happened")
    assert pair.accepted.recv(100) == b"as if nothing had happened"


def test_wildcards_are_invalid_destinations(host: vsockets.Attachment) -> None:
    with vsockets.socket(context=host) as sock:
        expect(errno.ENODEV, sock.connect, (VMADDR_CID_ANY, 5000))
        expect(errno.ECONNRESET, sock.connect, (VMADDR_CID_HOST, VMADDR_PORT_ANY))
    with vsockets.socket(type=stdlib.SOCK_DGRAM, context=host) as sock:
        expect(errno.EINVAL, sock.sendto, b"x", (VMADDR_CID_HOST, VMADDR_PORT_ANY))


def test_datagram_to_any_cid_stays_in_its_context(guest: vsockets.Attachment) -> None:
    with vsockets.socket(type=stdlib.SOCK_DGRAM, context=guest) as sock:
        sock.bind((VMADDR_CID_ANY, VMADDR_PORT_ANY))
        cid, port = sock.getsockname()
        sock.sendto(b"x", (VMADDR_CID_ANY, port))
        assert sock.recvfrom(10) == (b"x", (cid, port))


def test_hypervisor_without_services_refuses(guest: vsockets.Attachment) -> None:
    with vsockets.socket(context=guest) as sock:
        expect(errno.ECONNRESET, sock.connect, (vsockets.VMADDR_CID_HYPERVISOR, 976))


def test_construction() -> None:
    expect(errno.EAFNOSUPPORT, vsockets.socket, stdlib.AF_INET)
    expect(errno.ESOCKTNOSUPPORT, lambda: vsockets.socket(type=stdlib.SOCK_RAW))
    expect(errno.EPROTONOSUPPORT, lambda: vsockets.socket(proto=6))
    expect(errno.EBADF, lambda: vsockets.socket(fileno=10_000))
    with vsockets.socket(type=stdlib.SOCK_STREAM | stdlib.SOCK_NONBLOCK) as sock:
        assert sock.gettimeout() == 0
        assert sock.type == stdlib.SOCK_STREAM


def test_closed_sockets(pair: Pair) -> None:
    for sock in (pair.server, pair.client, pair.accepted):
        sock.close()
        sock.close()
        assert sock.fileno() == -1
    expect(errno.EBADF, pair.client.send, b"x")
    expect(errno.EBADF, pair.server.accept)


def test_missing_vsockd(tmp_path: Any) -> None:
    nowhere = vsockets.attach(tmp_path)
    with vsockets.socket(context=nowhere) as sock:
        with pytest.raises(OSError, match=f"vsock --dir {tmp_path.parent} up") as caught:
            sock.connect((2, 1))
        assert caught.value.errno == errno.ENODEV


def test_killed_vsockd(vsock_fabric: PrivateFabric, guest: vsockets.Attachment) -> None:
    host = vsock_fabric.host
    with vsockets.create_server(ANY, context=host) as server:
        client = vsockets.create_connection(server.getsockname(), context=guest)
        accepted, _ = server.accept()
        vsock_fabric.kill()
        with client, accepted:
            client.send(b"streams need no vsockd")
            assert accepted.recv(100) == b"streams need no vsockd"
            expect(errno.ENETDOWN, server.accept)
        vsock_fabric.start()


RESERVED = """
import errno, os, sys, vsockets
if len(sys.argv) > 1:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    vsockets.socket().bind((vsockets.VMADDR_CID_ANY, 80))
    print("bound")
except OSError as error:
    print(errno.errorcode[error.errno])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to have and to drop a privilege")
@pytest.mark.parametrize(("arguments", "outcome"), [([], "bound"), (["drop"], "EACCES")])
def test_reserved_ports_need_a_capability(
    vsock_fabric: PrivateFabric, arguments: list[str], outcome: str
) -> None:
    vsock_fabric.folder.chmod(0o755)
    vsock_fabric.folder.parent.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", RESERVED, *arguments],
        env={
            **vsock_fabric.environment(vsock_fabric.host),
            "PYTHONPATH": os.path.dirname(os.path.dirname(vsockets.__file__)),
        },
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.stdout, done.stderr) == (f"{outcome}\n", "")


def test_local_cid_and_address_family(
    host: vsockets.Attachment, guest: vsockets.Attachment
) -> None:
    assert vsockets.VMCISock_GetAFValue() == vsockets.AF_VSOCK == 40
    assert vsockets.get_local_cid(context=host) == VMADDR_CID_HOST
    assert vsockets.get_local_cid(context=guest) == guest.cid >= 3
