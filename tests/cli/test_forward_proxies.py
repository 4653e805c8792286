"""``vsock forward`` as a proxy: HTTP CONNECT and SOCKS5."""

from __future__ import annotations

import http.server
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator

import pytest

from vsockets.testing import PrivateFabric

from .forwarding import end, read_all, start, tcp
from .vsock import PATIENCE, Vsock

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


class _Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"a page\n")

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def page() -> Iterator[int]:
    """The port of a web server."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Page) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join(PATIENCE)


def curl(port: int, proxy: str, url: str) -> subprocess.CompletedProcess[str]:
    option = {
        "http-proxy:": ["--proxytunnel", "--proxy", f"http://127.0.0.1:{port}"],
        "socks5:": ["--socks5-hostname", f"127.0.0.1:{port}"],
    }[proxy]
    return subprocess.run(
        ["curl", "--silent", "--show-error", "--noproxy", "", *option, url],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@needs_curl
@pytest.mark.parametrize("proxy", ["http-proxy:", "socks5:"])
def test_curl_through_a_proxy(vsock: Vsock, fabric: PrivateFabric, page: int, proxy: str) -> None:
    """Curl in a networkless guest reaches what the host allows, and nothing else."""
    guest = fabric.guest()
    running, port = start(
        *(vsock, "vsock::any", proxy, "--allow-host", f"localhost:{page}"),
        *("--allow-host", f"127.0.0.1:{page}"),
    )
    door, tcp_port = start(
        *(vsock, "tcp:127.0.0.1:0", f"vsock:host:{port}"),
    )
    assert guest
    for host in ("localhost", "127.0.0.1"):
        done = curl(tcp_port, proxy, f"http://{host}:{page}/")
        assert done.stdout == "a page\n", done
    for url in (f"http://localhost:{page + 1}/", "http://example.invalid/", "http://10.0.0.1/"):
        done = curl(tcp_port, proxy, url)
        assert done.returncode
        assert done.stdout == ""
        assert "allow" in running.error_line()
    end(door)
    end(running)


@pytest.mark.parametrize("proxy", ["http-proxy:", "socks5:"])
def test_a_target_that_refuses_is_reported(vsock: Vsock, proxy: str) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        closed = nobody.getsockname()[1]
        running, port = start(vsock, "tcp:127.0.0.1:0", proxy, "--allow-host", "127.0.0.1")
        with tcp(port) as sock:
            if proxy == "socks5:":
                sock.sendall(b"\x05\x01\x00\x05\x01\x00\x01\x7f\0\0\1" + closed.to_bytes(2, "big"))
                assert read_all(sock) == b"\x05\x00\x05\x05\x00\x01" + bytes(6)
            else:
                sock.sendall(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: x\r\n\r\n" % closed)
                assert read_all(sock).startswith(b"HTTP/1.1 502 ")
        end(running)


def test_invalid_requests_are_answered_and_closed(vsock: Vsock) -> None:
    running, port = start(vsock, "tcp:127.0.0.1:0", "http-proxy:", "--allow-host", "*")
    with tcp(port) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_all(sock).startswith(b"HTTP/1.1 405 ")
    with tcp(port) as sock:
        sock.sendall(b"x" * 50_000)
        assert read_all(sock).startswith(b"HTTP/1.1 431 ")
    end(running)
