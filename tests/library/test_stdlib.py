"""Servers and protocols of the standard library, unchanged, over vSockets."""

from __future__ import annotations

import concurrent.futures
import http.client
import http.server
import multiprocessing.connection
import os
import shutil
import socket as stdlib
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vsockets
from vsockets.testing import PrivateFabric

from .conftest import ANY, Pair, running


class VsockServer(socketserver.ThreadingTCPServer):
    """A server on vSockets: the socket is replaced, and there is no host name."""

    daemon_threads = True

    def __init__(self, context: vsockets.Attachment, handler: Any) -> None:
        super().__init__(("", 0), handler, bind_and_activate=False)
        self.socket.close()
        self.socket = vsockets.create_server(ANY, context=context)
        self.server_address: Any = self.socket.getsockname()


class Upper(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(b"%d: " % self.client_address[0])
        self.wfile.write(self.rfile.readline().upper())


def serve(server: socketserver.BaseServer) -> Iterator[Any]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(10)


@pytest.fixture
def upper(host: vsockets.Attachment) -> Iterator[VsockServer]:
    yield from serve(VsockServer(host, Upper))


@pytest.fixture
def web(host: vsockets.Attachment, tmp_path: Path) -> Iterator[VsockServer]:
    (tmp_path / "page").write_bytes(b"x" * 500_000)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *arguments: Any) -> None:
            pass

    yield from serve(VsockServer(host, Handler))


def test_socketserver(upper: VsockServer, guest: vsockets.Attachment) -> None:
    def ask(number: int) -> bytes:
        with vsockets.create_connection(upper.server_address, 10, context=guest) as sock:
            sock.sendall(b"request %d\n" % number)
            return sock.makefile("rb").read()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(40)))
    assert answers == [b"%d: REQUEST %d\n" % (guest.cid, n) for n in range(40)]


class VsockHTTPConnection(http.client.HTTPConnection):
    def __init__(self, address: tuple[int, int], context: vsockets.Attachment) -> None:
        super().__init__("host")
        self._vsock_address, self._vsock_context = address, context

    def connect(self) -> None:
        self.sock = vsockets.create_connection(self._vsock_address, 10, context=self._vsock_context)


def test_http_server(web: VsockServer, guest: vsockets.Attachment) -> None:
    connection = VsockHTTPConnection(web.server_address, guest)
    for _ in range(3):
        connection.request("GET", "/page")
        response = connection.getresponse()
        assert (response.status, len(response.read())) == (200, 500_000)
    connection.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-subj", "/CN=host", "-addext", "subjectAltName=DNS:host", "-days", "2"),
            *("-keyout", str(folder / "key"), "-out", str(folder / "certificate")),
        ],
        check=True,
        capture_output=True,
        timeout=30,
    )
    return folder


def test_tls(stream: Pair, certificate: Path) -> None:
    ssl = pytest.importorskip("ssl")
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(certificate / "certificate", certificate / "key")
    client = ssl.create_default_context(cafile=certificate / "certificate")

    def answer() -> None:
        with server.wrap_socket(stream.accepted, server_side=True) as secure:
            data = secure.recv(100)
            secure.sendall(data * 10_000)

    with running(answer), client.wrap_socket(stream.client, server_hostname="host") as secure:
        secure.sendall(b"secret")
        received = b""
        while len(received) < 60_000:
            received += secure.recv(1 << 16)
        assert received == b"secret" * 10_000
        assert secure.version() == "TLSv1.3"


def test_multiprocessing_connections(stream: Pair) -> None:
    # A multiprocessing connection reads whole messages, so the descriptor must block.
    stream.client.setblocking(True)
    stream.accepted.setblocking(True)
    connection = multiprocessing.connection.Connection(stream.client.detach())
    peer = multiprocessing.connection.Connection(stream.accepted.detach())
    with connection, peer:
        connection.send({"any": ["object", 1, None]})
        assert peer.recv() == {"any": ["object", 1, None]}
        peer.send_bytes(bytes(100_000))
        assert multiprocessing.connection.wait([connection], 10) == [connection]
        assert len(connection.recv_bytes()) == 100_000


INSTALLED = """
import vsockets
vsockets.install()
vsockets.install()
import socket

inet = socket.socket()
assert type(inet).__module__ == "socket" and inet.family == socket.AF_INET
assert isinstance(inet, socket.socket)
inet.close()

class Mine(socket.socket):
    pass

mine = Mine(socket.AF_INET, socket.SOCK_DGRAM)
assert isinstance(mine, Mine) and isinstance(mine, socket.socket)
mine.close()
one, other = socket.socketpair()
assert isinstance(one, socket.socket) and issubclass(type(one), socket.socket)
one.close(), other.close()

with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as server:
    assert isinstance(server, vsockets.socket) and isinstance(server, socket.socket)
    server.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
    server.listen()
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as client:
        client.connect(server.getsockname())
        accepted, peer = server.accept()
        assert peer == client.getsockname() and peer[0] == vsockets.get_local_cid()
        accepted.close()
print("done")
"""


def test_install(vsock_fabric: PrivateFabric) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", INSTALLED],
        env={
            **vsock_fabric.environment(vsock_fabric.guest()),
            "PYTHONPATH": os.path.dirname(os.path.dirname(vsockets.__file__)),
        },
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_subclass_keeps_its_overrides(
    host: vsockets.Attachment, guest: vsockets.Attachment
) -> None:
    class Counting(vsockets.socket):
        sent = 0

        def send(self, data: Any, flags: int = 0, /) -> int:
            self.sent += len(data)
            return super().send(data, flags)

    with (
        vsockets.create_server(ANY, context=host) as server,
        Counting(context=guest) as client,
    ):
        client.connect(server.getsockname())
        assert isinstance(client, Counting)
        accepted, _ = server.accept()
        with accepted:
            assert client.send(b"12345") == 5
            assert accepted.recv(10) == b"12345"
            assert client.sent == 5
    with Counting(type=stdlib.SOCK_DGRAM, context=guest) as sock:
        assert isinstance(sock, Counting)
        sock.bind(ANY)
