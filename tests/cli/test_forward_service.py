"""``vsock forward`` as a service: many clients, signals, a file of forwards, systemd."""

from __future__ import annotations

import contextlib
import re
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import vsockets
from vsockets.testing import PrivateFabric, wait_until

from .forwarding import ask, end, read_all, start, tcp
from .vsock import PATIENCE, PROGRAM, Vsock


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
        wait_until(lambda: _refuses(port), "the listener to close", PATIENCE)
        assert running.error_line().startswith("draining for 30 s: connections left: ")
        client.sendall(b"after")
        assert client.recv(100) == b"after"
        assert running.process.poll() is None
    running.finish()


def test_a_second_signal_closes_connections(vsock: Vsock, echo: int) -> None:
    running, port = start(vsock, "tcp:127.0.0.1:0", f"vsock:host:{echo}")
    with tcp(port) as client:
        client.sendall(b"before")
        assert client.recv(100) == b"before"
        running.process.send_signal(signal.SIGTERM)
        wait_until(lambda: _refuses(port), "the listener to close", PATIENCE)
        running.process.send_signal(signal.SIGTERM)
        assert read_all(client) == b""
    assert "connections closed: " in running.finish()[1]


def _refuses(port: int) -> bool:
    try:
        tcp(port).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        pass  # it was in the backlog when the listener was closed
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
        assert reload() == "reloaded"
        standing.sendall(b"2")  # its forward was removed; the connection continues
        assert standing.recv(1) == b"2"
        assert not (tmp_path / "one").exists()
        assert ask(connect("two")) == b"new\n"
        assert ask(connect("three")) == b"question"
    for _ in range(5):  # the lines of -v about these
        running.error_line()
    write((two, "tcp:nowhere"))
    assert re.match(r"not reloaded: .*:3: forward.to: 'tcp:nowhere'", reload())
    assert ask(connect("two")) == b"new\n"
    end(running)


def with_passed_socket(vsock: Vsock, server: socket.socket, echo: int) -> subprocess.Popen[bytes]:
    """Start a forward from ``server``, passed as systemd does."""
    # As in sd_listen_fds(3): descriptor 3, and the process's own id.
    script = (
        "import os, sys; fd = int(sys.argv[1]); os.dup2(fd, 3) if fd != 3 else None; "
        "os.set_inheritable(3, True); os.environ['LISTEN_PID'] = str(os.getpid()); "
        "os.environ.update(LISTEN_FDS='1', LISTEN_FDNAMES='web'); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script, str(server.fileno()), *PROGRAM[1:], "forward"]
        + ["fd:web", f"vsock:host:{echo}"],
        env=vsock.environment,
        pass_fds=[server.fileno()],
    )


def test_systemd_passes_the_socket(vsock: Vsock, echo: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = with_passed_socket(vsock, server, echo)
        try:
            assert ask(tcp(server.getsockname()[1])) == b"question"
        finally:
            process.terminate()
            assert process.wait(PATIENCE) == 0


def test_clients_of_a_passed_socket_wait_after_a_crash(vsock: Vsock, echo: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        process = with_passed_socket(vsock, server, echo)
        with tcp(port) as standing:
            standing.sendall(b"1")
            assert standing.recv(1) == b"1"
            process.kill()
            process.wait(PATIENCE)
            assert standing.recv(1) == b""
        with tcp(port) as waiting:
            process = with_passed_socket(vsock, server, echo)
            try:
                assert ask(waiting) == b"question"
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
