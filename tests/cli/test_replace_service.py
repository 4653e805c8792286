"""``vsock forward`` and ``vsock amqp``: another process takes over at SIGUSR2."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import vsockets
from vsockets.testing import PrivateFabric, wait_until

from .forwarding import ask, end, start, tcp
from .vsock import PATIENCE, Running, Vsock


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def replace(running: Running) -> int:
    """Have a service replaced; return the process id of the process that serves."""
    before = children(running.process.pid)
    running.process.send_signal(signal.SIGUSR2)
    while "replaced by process" not in (line := running.error_line()):
        assert "not replaced" not in line, line
    (new,) = [pid for pid in children(running.process.pid) if pid not in before]
    assert line == f"replaced by process {new}"
    return new


class Clients:
    """Clients that connect without a pause, in a thread, and fail at the first refusal."""

    def __init__(self, *connects: Callable[[], socket.socket]) -> None:
        self.served = 0
        self.failure: BaseException | None = None
        self._stop = threading.Event()
        self._connects = connects
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Clients:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                for connect in self._connects:
                    assert ask(connect(), b"%d" % self.served) == b"%d" % self.served
                    self.served += 1
        except BaseException as failure:
            self.failure = failure

    def wait_for(self, number: int) -> None:
        """Wait until so many further clients were served."""
        goal = self.served + number
        wait_until(lambda: self.served >= goal or self.failure, "clients to be served", PATIENCE)


def test_forwards_are_replaced_under_load(
    vsock: Vsock, fabric: PrivateFabric, tcp_echo: int, tmp_path: Path
) -> None:
    """No client is refused; streams go on in the process that has accepted them."""
    file, unix = tmp_path / "forwards.toml", tmp_path / "unix"
    sources = "tcp:127.0.0.1:0", f"unix:{unix}", "vsock::7050", f"unix:{tmp_path}/removed"
    lines = [f'[[forward]]\nfrom = "{one}"\nto = "tcp:127.0.0.1:{tcp_echo}"\n' for one in sources]
    file.write_text("".join(lines))
    running = vsock.start("forward", "--config", file)
    found = [running.error_line() for _ in sources]
    port = int(found[0].rpartition(":")[2])
    guest = fabric.guest()

    def to_unix() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(os.fspath(unix))
        return sock

    def to_vsock() -> socket.socket:
        return vsockets.create_connection((2, 7050), PATIENCE, context=guest)

    def to_tcp() -> socket.socket:
        return tcp(port)

    connects = to_tcp, to_unix, to_vsock
    file.write_text("".join(lines[:-1]))
    with contextlib.ExitStack() as stack:
        established = []
        with Clients(*connects) as clients:
            for _ in range(3):
                established += [stack.enter_context(connect()) for connect in connects]
                for number, sock in enumerate(established):
                    sock.settimeout(PATIENCE)
                    sock.sendall(b"%d" % number)
                    assert sock.recv(10) == b"%d" % number
                replace(running)
                clients.wait_for(30)
        assert not (tmp_path / "removed").exists()
        for number, sock in enumerate(established):
            sock.sendall(b"again %d" % number)
            assert sock.recv(20) == b"again %d" % number
        # Workers without connections have ended: the main process, the serving one, and none else
        # once the streams have ended.
        assert len(children(running.process.pid)) == 3
        for sock in established[1:]:
            sock.close()
        wait_until(lambda: len(children(running.process.pid)) == 1, "old workers to end", PATIENCE)
        assert ask(tcp(port)) == b"question"
        standing = stack.enter_context(tcp(port))
        standing.settimeout(PATIENCE)
        standing.sendall(b"1")
        assert standing.recv(1) == b"1"
        # As from a service manager or a terminal: a signal for every process.
        for pid in (*children(running.process.pid), running.process.pid):
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not unix.exists(), "the listeners to close", PATIENCE)
        for sock in (standing, established[0]):
            sock.sendall(b"2")
            assert sock.recv(1) == b"2"
            sock.close()
    running.finish()
    with pytest.raises(ConnectionRefusedError):
        tcp(port)


def test_process_that_cannot_replace(vsock: Vsock, tcp_echo: int, tmp_path: Path) -> None:
    """The old process goes on if the new one cannot start, and a crashed one ends the service."""
    file = tmp_path / "forwards.toml"
    good = f'[[forward]]\nfrom = "tcp:127.0.0.1:0"\nto = "tcp:127.0.0.1:{tcp_echo}"\n'
    file.write_text(good)
    running = vsock.start("forward", "--config", file)
    port = int(running.error_line().rpartition(":")[2])
    for _ in range(2):
        file.write_text("mistake")
        running.process.send_signal(signal.SIGUSR2)
        while not (line := running.error_line()).startswith("not replaced: "):
            pass
        assert line == "not replaced: the process has ended; see its messages"
        assert ask(tcp(port)) == b"question"
        file.write_text(good)
        new = replace(running)
    os.kill(new, signal.SIGKILL)
    message = running.finish(expect=1)[1]
    assert "the process that has replaced this one failed (status -9)" in message


#: Run in each worker: a child keeps the worker's link open until the worker was reaped.
KEEPER_OF_THE_LINK = """\
import os
if "VSOCKETS_REPLACEMENT_LINK" in os.environ and os.fork() == 0:
    worker = os.getppid()
    for output in 0, 1, 2:
        os.close(output)
    while True:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            os._exit(0)
"""


def test_worker_that_ends_while_its_link_is_read(
    vsock: Vsock, tcp_echo: int, tmp_path: Path
) -> None:
    """The link is not closed, and its descriptor not reused, while a thread waits for a message."""
    (tmp_path / "sitecustomize.py").write_text(KEEPER_OF_THE_LINK)
    vsock.environment["PYTHONPATH"] = os.fspath(tmp_path)
    file = tmp_path / "forwards.toml"
    file.write_text(f'[[forward]]\nfrom = "tcp:127.0.0.1:0"\nto = "tcp:127.0.0.1:{tcp_echo}"\n')
    running = vsock.start("forward", "--config", file)
    running.error_line()
    file.write_text("mistake")
    running.process.send_signal(signal.SIGUSR2)
    while not (line := running.error_line()).startswith("not replaced: "):
        pass
    assert line == "not replaced: the process has ended; see its messages"
    end(running)


def test_worker_ends_with_its_main_process(vsock: Vsock, tcp_echo: int) -> None:
    running, port = start(vsock, "tcp:127.0.0.1:0", f"tcp:127.0.0.1:{tcp_echo}")
    worker = os.pidfd_open(replace(running))
    running.process.kill()
    running.process.wait(PATIENCE)
    try:
        vsockets.testing.wait_until(lambda: _has_ended(worker), "the worker to end", PATIENCE)
    finally:
        os.close(worker)
    with pytest.raises(ConnectionRefusedError):
        tcp(port)


def _has_ended(pidfd: int) -> bool:
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return True
    return False


def test_replies_to_datagrams_of_the_old_process(vsock: Vsock, fabric: PrivateFabric) -> None:
    """A reply that is late arrives; later datagrams are the new process's."""
    guest = fabric.guest()
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as service,
        vsockets.socket(type=socket.SOCK_DGRAM, context=guest) as client,
    ):
        service.bind(("127.0.0.1", 0))
        for sock in (service, client):
            sock.settimeout(PATIENCE)
        target = f"udp:127.0.0.1:{service.getsockname()[1]}"
        running, port = start(vsock, "vsock-dgram::any", target)
        sources = []
        for number in range(3):
            client.sendto(b"%d" % number, (2, port))
            data, source = service.recvfrom(100)
            assert data == b"%d" % number
            sources.append(source)
            replace(running)
        assert len(set(sources)) == 3
        for source in sources:
            service.sendto(b"reply", source)
            assert client.recvfrom(100) == (b"reply", (2, port))
        end(running)


def test_amqp_proxy_keeps_links(vsock: Vsock, tmp_path: Path) -> None:
    """A host proxy's link to the old process stays; the new one accepts."""
    path = tmp_path / "proxy"
    running = vsock.start("amqp", "proxy", "--listen", f"unix:{path}", "--node", "unix:/none")
    running.error_line()
    with socket.socket(socket.AF_UNIX) as old, socket.socket(socket.AF_UNIX) as new:
        for sock in (old, new):
            sock.settimeout(PATIENCE)
            sock.connect(str(path))
            # HTTP/2: the preface and an empty SETTINGS frame, answered by a SETTINGS frame (4).
            sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
            assert sock.recv(9)[3] == 4
            if sock is old:
                replace(running)
        old.sendall(bytes((0, 0, 8, 6, 0, 0, 0, 0, 0)) + b"12345678")  # PING
        received = b""
        while b"12345678" not in received:
            received += old.recv(1000)
        end(running)
    assert not path.exists()


def test_amqp_guest_proxy_keeps_sessions(vsock: Vsock, fabric: PrivateFabric) -> None:
    """A session of the old process goes on; the new one accepts.  The test plays the broker."""
    header = b"AMQP\0\0\x09\x01"
    frame = b"\x01\0\0\0\0\0\x04\0\x0a\0\x0a\xce"  # a method: connection.start
    with vsockets.create_server((2, vsockets.VMADDR_PORT_ANY), context=fabric.host) as broker:
        broker.settimeout(PATIENCE)
        host = f"vsock:2:{broker.getsockname()[1]}"
        running = vsock.start("amqp", "guest-proxy", "--listen", "tcp:127.0.0.1:0", "--host", host)
        port = int(running.error_line().rpartition(":")[2])
        sessions = []
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                client = stack.enter_context(tcp(port))
                client.sendall(header)
                far = stack.enter_context(broker.accept()[0])
                far.settimeout(PATIENCE)
                assert far.recv(100) == header
                sessions.append((client, far))
                for near, behind in sessions:
                    behind.sendall(frame)
                    assert near.recv(100) == frame
                replace(running)
            assert len(children(running.process.pid)) == 2
        end(running)
