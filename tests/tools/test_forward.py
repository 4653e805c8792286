"""``vsock forward``, in processes of its own, between real sockets."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import vsockets
from vsockets.testing import PrivateFabric, wait_until

from .vsock import PATIENCE, PROGRAM, Running, Vsock

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


class Echo:
    """A service on a listening socket: what comes goes back, until the end."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                threading.Thread(target=self._echo, args=(sock,), daemon=True).start()

    @staticmethod
    def _echo(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            while data := sock.recv(65536):
                sock.sendall(data)


@pytest.fixture(scope="module")
def echo(fabric: PrivateFabric) -> Iterator[int]:
    """The port of an echo service on the host."""
    address = (2, vsockets.VMADDR_PORT_ANY)
    with vsockets.create_server(address, backlog=1000, context=fabric.host) as server:
        Echo(server)
        yield server.getsockname()[1]


@pytest.fixture(scope="module")
def tcp_echo() -> Iterator[int]:
    """The port of an echo service over TCP."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        Echo(server)
        yield server.getsockname()[1]


def start(vsock: Vsock, *arguments: object) -> tuple[Running, int]:
    """A forwarder that listens on a free port, and that port."""
    running = vsock.start("forward", *arguments)
    found = re.fullmatch(r"listening on \S+:(\d+)", running.error_line())
    assert found
    return running, int(found[1])


def tcp(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), PATIENCE)


def answer_of(port: int) -> bytes:
    """What somebody who says nothing is told."""
    with tcp(port) as sock:
        return read_all(sock)


def read_all(sock: socket.socket) -> bytes:
    sock.settimeout(PATIENCE)
    data = b""
    while piece := sock.recv(65536):
        data += piece
    return data


def ask(sock: socket.socket, question: bytes = b"question") -> bytes:
    """Half-close after the question; what comes back."""
    with sock:
        sock.sendall(question)
        sock.shutdown(socket.SHUT_WR)
        return read_all(sock)


def end(running: Running, expect: int = 0) -> str:
    running.process.send_signal(signal.SIGTERM)
    return running.finish(expect=expect)[1]


def test_tcp_to_vsock(vsock: Vsock, echo: int) -> None:
    running, port = start(vsock, "tcp:127.0.0.1:0", f"vsock:host:{echo}", "-v")
    data = os.urandom(1 << 20)
    with tcp(port) as sock:
        sender = threading.Thread(target=sock.sendall, args=(data,))
        sender.start()
        received = b""
        while len(received) < len(data):
            received += sock.recv(65536)
        sender.join()
    assert received == data
    text = end(running)
    assert re.search(rf"127.0.0.1:\d+ ended: {1 << 20} bytes there, {1 << 20} back", text)


def test_from_a_guest_to_tcp(vsock: Vsock, fabric: PrivateFabric, tcp_echo: int) -> None:
    guest = fabric.guest()
    running, port = start(vsock, "vsock::any", f"tcp:localhost:{tcp_echo}", "--allow", guest.cid)
    assert ask(vsockets.create_connection((2, port), context=guest)) == b"question"
    # another guest is not allowed
    other = fabric.guest()
    with vsockets.create_connection((2, port), PATIENCE, context=other) as sock:
        assert sock.recv(1) == b""
    assert f"{other.cid}:" in running.error_line()
    end(running)


def test_unix_and_hybrid_vsock(vsock: Vsock, echo: int, tmp_path: Path) -> None:
    # A stand-in for a device: the convention is a line there and a line back.
    with socket.socket(socket.AF_UNIX) as device:
        device.bind(str(tmp_path / "v.sock"))
        device.listen()
        running = vsock.start(
            "forward", f"unix:{tmp_path}/in", f"vsock-mux:{tmp_path}/v.sock:52", "-v"
        )
        assert "listening on unix:" in running.error_line()
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(tmp_path / "in"))
        client.sendall(b"early")
        sock, _ = device.accept()
        sock.settimeout(PATIENCE)
        with sock:
            assert sock.recv(100) == b"CONNECT 52\n"
            sock.sendall(b"OK 1073741824\nhello")  # the stream may begin in the same write
            assert sock.recv(100) == b"early"
        with client:
            assert read_all(client) == b"hello"
        end(running)
    assert not (tmp_path / "in").exists()
    # The other direction: the device connects to PATH_PORT for its guest.
    running = vsock.start("forward", f"vsock-mux:{tmp_path}/v.sock:52", f"vsock:host:{echo}", "-v")
    running.error_line()
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(tmp_path / "v.sock_52"))
    assert ask(client) == b"question"
    end(running)


@pytest.mark.parametrize(
    ("address", "path", "said"),
    [
        ("vsock-mux/{}/v.sock:52", "v.sock", b"CONNECT 52\n"),
        ("vsock-mux/{}/v.sock", "v.sock", b"CONNECT 22\n"),
        ("hyperkit:{}:3:52", "connect", b"00000003.00000034\n"),
        ("vsock-emu:{}:3:52", "3.52", b""),
    ],
)
def test_conventions_of_others_to_the_guest(
    vsock: Vsock, tmp_path: Path, address: str, path: str, said: bytes
) -> None:
    """Played after their documents: what is connected to, and what is said there."""
    with socket.socket(socket.AF_UNIX) as device:
        device.bind(str(tmp_path / path))
        device.listen()
        running = vsock.start("forward", f"unix:{tmp_path}/in", address.format(tmp_path), "-v")
        running.error_line()
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(str(tmp_path / "in"))
            sock, _ = device.accept()
            with sock:
                sock.settimeout(PATIENCE)
                assert sock.recv(len(said)) == said
                if said.startswith(b"CONNECT"):
                    sock.sendall(b"OK 1024\n")
                client.sendall(b"question")
                assert sock.recv(100) == b"question"
                sock.sendall(b"answer")
                assert client.recv(100) == b"answer"
        end(running)


@pytest.mark.parametrize(
    ("address", "path"),
    [("hyperkit:{}::52", "00000002.00000034"), ("vsock-emu:{}:host:52", "2.52")],
)
def test_conventions_of_others_from_the_guest(
    vsock: Vsock, echo: int, tmp_path: Path, address: str, path: str
) -> None:
    running = vsock.start("forward", address.format(tmp_path), f"vsock:host:{echo}", "-v")
    running.error_line()
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(tmp_path / path))
    assert ask(client) == b"question"
    end(running)
    assert not (tmp_path / path).exists()


def test_a_stale_unix_socket_is_replaced_and_a_live_one_is_not(
    vsock: Vsock, echo: int, tmp_path: Path
) -> None:
    path = tmp_path / ("long-" * 25) / "s"  # more than fits a unix address
    path.parent.mkdir()
    running = vsock.start("forward", f"unix:{path}", f"vsock:host:{echo}", "-v")
    running.error_line()
    line = vsock.fails("forward", f"unix:{path}", f"vsock:host:{echo}")
    assert line == f"cannot listen on unix:{path}: Address already in use"
    running.process.kill()
    running.process.wait()
    assert path.exists()
    running = vsock.start("forward", f"unix:{path}", f"vsock:host:{echo}", "-v")
    running.error_line()
    end(running)


def test_a_program_for_each_connection(vsock: Vsock, fabric: PrivateFabric) -> None:
    guest = fabric.guest()
    running, port = start(vsock, "vsock::any", "exec:sh -c 'echo $VSOCK_PEER_CID; cat'")
    for _ in range(2):
        answer = ask(vsockets.create_connection((2, port), context=guest))
        assert answer == b"%d\nquestion" % guest.cid
    end(running)


def test_standard_input_and_output(vsock: Vsock, echo: int) -> None:
    """As an ssh ProxyCommand uses it."""
    done = vsock("forward", "stdio:", f"vsock:host:{echo}", data=b"through")
    assert done.stdout == "through"
    running, port = start(vsock, "tcp:127.0.0.1:0", "stdio:")
    with tcp(port) as sock:
        sock.sendall(b"to stdout\n")
        assert running.read_line() == "to stdout"
        running.write(b"from stdin")
        running.end_of_input()
        assert read_all(sock) == b"from stdin"
    running.finish()


def test_what_cannot_be_is_said_in_one_line(vsock: Vsock, tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text('[[forward]]\nfrom = "tcp::0"\nto = "vsock:3"\n')
    vsock.fail(
        ("forward", 2, "expected FROM and TO"),
        ("forward tcp::1 http-proxy:", 2, "needs hosts"),
        ("forward stdio: vsock:host:9", 1, "nobody listens there"),
        (f"forward --config {bad}", 1, "bad.toml:3: forward.to: 'vsock:3': expected CID:PORT"),
    )


def test_a_target_that_refuses_and_one_that_dies(
    vsock: Vsock, fabric: PrivateFabric, tcp_echo: int
) -> None:
    running, port = start(vsock, "tcp:127.0.0.1:0", "vsock:host:7001")
    assert answer_of(port) == b""
    with vsockets.create_server((2, 7001), context=fabric.host) as server:
        client = tcp(port)
        client.sendall(b"x")
        sock, _ = server.accept()
        sock.settimeout(PATIENCE)
        assert sock.recv(1) == b"x"
        sock.close()
        assert read_all(client) == b""
        client.close()
    end(running)


def test_wait_for_the_target(vsock: Vsock, fabric: PrivateFabric) -> None:
    running, port = start(vsock, "tcp:127.0.0.1:0", "vsock:host:7002", "--wait", 30)
    with tcp(port) as client:
        client.sendall(b"patience")
        with vsockets.create_server((2, 7002), context=fabric.host) as server:
            sock, _ = server.accept()
            with sock:
                sock.settimeout(PATIENCE)
                assert sock.recv(100) == b"patience"
    end(running)


def test_idle_connections_end(vsock: Vsock, echo: int) -> None:
    running, port = start(vsock, "tcp:127.0.0.1:0", f"vsock:host:{echo}", "--idle", 0.1)
    assert answer_of(port) == b""
    end(running)


def test_a_thousand_connections_at_once(vsock: Vsock, fabric: PrivateFabric, echo: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    running, port = start(vsock, "vsock::any", f"vsock:host:{echo}")
    guest = fabric.guest()
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        socks = []
        for _ in range(1000):
            sock = stack.enter_context(
                vsockets.create_connection((2, port), PATIENCE, context=guest)
            )
            sock.settimeout(PATIENCE)
            socks.append(sock)
        for number, sock in enumerate(socks):
            sock.sendall(b"%d\n" % number)
        for number, sock in enumerate(socks):
            assert sock.recv(100) == b"%d\n" % number
    end(running)


def test_more_clients_than_allowed_wait(vsock: Vsock, tcp_echo: int) -> None:
    running, port = start(
        vsock, "tcp:127.0.0.1:0", f"tcp:127.0.0.1:{tcp_echo}", "--max-connections", 1
    )
    with tcp(port) as first, tcp(port) as second:
        first.sendall(b"1")
        assert first.recv(1) == b"1"
        second.sendall(b"2")
        second.setblocking(False)
        with pytest.raises(BlockingIOError):
            second.recv(1)
        first.close()
        second.settimeout(PATIENCE)
        assert second.recv(1) == b"2"
    end(running)


def test_sigterm_lets_connections_end(vsock: Vsock, echo: int) -> None:
    running, port = start(vsock, "tcp:127.0.0.1:0", f"vsock:host:{echo}")
    with tcp(port) as client:
        client.sendall(b"before")
        assert client.recv(100) == b"before"
        running.process.send_signal(signal.SIGTERM)
        wait_until(lambda: _refuses(port), "the door to close", PATIENCE)
        assert running.error_line().startswith("connections that may end within 30 s: ")
        client.sendall(b"after")
        assert client.recv(100) == b"after"
        assert running.process.poll() is None
    running.finish()


def test_a_second_signal_cuts_them(vsock: Vsock, echo: int) -> None:
    running, port = start(vsock, "tcp:127.0.0.1:0", f"vsock:host:{echo}")
    with tcp(port) as client:
        client.sendall(b"before")
        assert client.recv(100) == b"before"
        running.process.send_signal(signal.SIGTERM)
        wait_until(lambda: _refuses(port), "the door to close", PATIENCE)
        running.process.send_signal(signal.SIGTERM)
        assert read_all(client) == b""
    assert "connections cut: " in running.finish()[1]


def _refuses(port: int) -> bool:
    try:
        tcp(port).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        pass  # it was in the backlog when the door was closed
    return False


def test_a_file_of_forwards_is_read_again(
    vsock: Vsock, echo: int, tcp_echo: int, tmp_path: Path
) -> None:
    file = tmp_path / "forwards.toml"

    def write(*forwards: tuple[str, str]) -> None:
        file.write_text(
            "".join(f'[[forward]]\nfrom = "{a}"\nto = "{b}"\nidle = 60\n' for a, b in forwards)
        )

    def reload() -> str:
        running.process.send_signal(signal.SIGHUP)
        return running.error_line()

    one, two, three = (f"unix:{tmp_path}/{name}" for name in ("one", "two", "three"))
    write((one, f"vsock:host:{echo}"), (two, "exec:sh -c 'cat > /dev/null; echo old'"))
    running = vsock.start("forward", "--config", file, "-v")
    assert {running.error_line() for _ in range(2)} == {
        f"listening on {one}",
        f"listening on {two}",
    }

    def connect(name: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE)
        sock.connect(str(tmp_path / name))
        return sock

    with connect("one") as standing:
        standing.sendall(b"1")
        assert standing.recv(1) == b"1"
        assert "connected" in running.error_line()
        write((two, "exec:sh -c 'cat > /dev/null; echo new'"), (three, f"tcp:127.0.0.1:{tcp_echo}"))
        assert reload() == "read again"
        standing.sendall(b"2")  # its forward is gone, and it is not
        assert standing.recv(1) == b"2"
        assert not (tmp_path / "one").exists()
        assert ask(connect("two")) == b"new\n"
        assert ask(connect("three")) == b"question"
    for _ in range(5):  # what -v has to say of these
        running.error_line()
    write((two, "tcp:nowhere"))
    assert re.match(r"nothing was changed: .*:3: forward.to: 'tcp:nowhere'", reload())
    assert ask(connect("two")) == b"new\n"
    end(running)


def test_systemd_passes_the_socket(vsock: Vsock, echo: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        # As sd_listen_fds(3) has it: descriptor 3, and our own process id.
        script = (
            "import os, sys; fd = int(sys.argv[1]); os.dup2(fd, 3) if fd != 3 else None; "
            "os.set_inheritable(3, True); os.environ['LISTEN_PID'] = str(os.getpid()); "
            "os.environ.update(LISTEN_FDS='1', LISTEN_FDNAMES='web'); "
            "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(server.fileno()), *PROGRAM[1:], "forward"]
            + ["fd:web", f"vsock:host:{echo}"],
            env=vsock.environment,
            pass_fds=[server.fileno()],
        )
        try:
            assert ask(tcp(server.getsockname()[1])) == b"question"
        finally:
            process.terminate()
            assert process.wait(PATIENCE) == 0


def test_it_outlives_vsockd(tcp_echo: int) -> None:
    with PrivateFabric() as fabric, Vsock(fabric.folder) as vsock:
        running = vsock.start("forward", "vsock::7003", f"tcp:127.0.0.1:{tcp_echo}", "-v")
        running.error_line()
        with vsockets.create_connection((2, 7003), PATIENCE, context=fabric.host) as standing:
            standing.sendall(b"before")
            assert standing.recv(100) == b"before"
            assert "connected" in running.error_line()
            fabric.kill()
            assert "cannot accept" in running.error_line()
            standing.sendall(b"meanwhile")
            assert standing.recv(100) == b"meanwhile"
            fabric.start()
            assert running.error_line() == "vsock:any:7003: listening again"
        assert ask(vsockets.create_connection((2, 7003), context=fabric.host)) == b"question"
        end(running)


# Datagrams


def test_udp_to_vsock_keeps_boundaries_and_clients_apart(
    vsock: Vsock, fabric: PrivateFabric
) -> None:
    with (
        vsockets.socket(type=socket.SOCK_DGRAM, context=fabric.host) as service,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other,
    ):
        service.bind((2, vsockets.VMADDR_PORT_ANY))
        running, port = start(
            vsock, "udp:127.0.0.1:0", f"vsock-dgram:local:{service.getsockname()[1]}", "-v"
        )
        for sock in (service, one, other):
            sock.settimeout(PATIENCE)
        sources = {}
        for sock, name in ((one, b"one"), (other, b"other")):
            sock.connect(("127.0.0.1", port))
            for data in (name, b"", name * 1000):
                sock.send(data)
            for data in (name, b"", name * 1000):
                received, sources[name] = service.recvfrom(70_000)
                assert received == data
        assert sources[b"one"] != sources[b"other"]
        for name, source in sources.items():
            service.sendto(b"to " + name, source)
        assert one.recv(100) == b"to one"
        assert other.recv(100) == b"to other"
        text = end(running)
        assert text.count("3 datagrams there, 1 back, 0 dropped") == 2


def test_vsock_datagrams_to_udp_and_unix(
    vsock: Vsock, fabric: PrivateFabric, tmp_path: Path
) -> None:
    guest = fabric.guest()
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unix,
    ):
        udp.bind(("127.0.0.1", 0))
        unix.bind(str(tmp_path / "s"))
        targets = {
            udp: f"udp:localhost:{udp.getsockname()[1]}",
            unix: f"unix-dgram:{tmp_path}/s",
        }
        for service, target in targets.items():
            service.settimeout(PATIENCE)
            running, port = start(vsock, "vsock-dgram::any", target, "--allow", guest.cid)
            with vsockets.socket(type=socket.SOCK_DGRAM, context=guest) as client:
                client.settimeout(PATIENCE)
                for data in (b"ping", b"x" * 60_000):
                    client.sendto(data, (2, port))
                    received, source = service.recvfrom(70_000)
                    assert received == data
                    service.sendto(b"pong", source)
                    assert client.recvfrom(100) == (b"pong", (2, port))
            end(running)


def test_flows_end_when_idle_and_when_there_are_too_many(
    vsock: Vsock, fabric: PrivateFabric
) -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as service,
        contextlib.ExitStack() as stack,
    ):
        service.bind(("127.0.0.1", 0))
        service.settimeout(PATIENCE)
        running, port = start(
            *(vsock, "udp:127.0.0.1:0", f"udp:127.0.0.1:{service.getsockname()[1]}"),
            *("-v", "--max-connections", 2, "--idle", 1),
        )
        for _ in range(3):
            client = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            client.sendto(b"x", ("127.0.0.1", port))
            service.recvfrom(10)
        for _ in range(3):  # one for the third client, two in silence
            assert "1 datagrams there, 0 back" in running.error_line()
        end(running)


# Proxies


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


def test_nonsense_is_answered_and_ended(vsock: Vsock) -> None:
    running, port = start(vsock, "tcp:127.0.0.1:0", "http-proxy:", "--allow-host", "*")
    with tcp(port) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_all(sock).startswith(b"HTTP/1.1 405 ")
    with tcp(port) as sock:
        sock.sendall(b"x" * 50_000)
        assert read_all(sock).startswith(b"HTTP/1.1 431 ")
    end(running)
