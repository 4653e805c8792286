"""``make soak``: vsockd is replaced and killed very often under load, and nothing is lost.

Streams are echoed by a process with the listeners, and checked byte by byte by another one, which
also connects, binds and sends datagrams all the time.  At the end every stream is checked, and what
vsockd holds is compared with what it held at the beginning.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import select
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import vsockets
from vsockets import AF_VSOCK, Attachment
from vsockets.limits import DATAGRAM_ROUTES_MAX
from vsockets.testing import PrivateFabric, wait_until

_FIRST_PORT, _DATAGRAM_PORT = 10_000, 9_000
_LIMITS = {"sockets": 100_000, "request_rate": 1_000_000, "pending_connects": 10_000}


def echo(host: Attachment, listeners: int, ready: int) -> None:
    """Accept on all listeners, and send back what comes, until this process is killed."""
    allow_descriptors()
    events = select.epoll()
    servers: dict[int, vsockets.socket] = {}
    streams: dict[int, vsockets.socket] = {}
    for number in range(listeners):
        server = vsockets.create_server((2, _FIRST_PORT + number), context=host, backlog=1000)
        servers[server.fileno()] = server
        events.register(server.fileno(), select.EPOLLIN)
    datagrams = vsockets.socket(AF_VSOCK, socket.SOCK_DGRAM, context=host)
    datagrams.bind((2, _DATAGRAM_PORT))
    events.register(datagrams.fileno(), select.EPOLLIN)
    os.write(ready, b"r")
    while True:
        for fd, _ in events.poll():
            if fd == datagrams.fileno():
                datagrams.sendto(*datagrams.recvfrom(100))
            elif fd in servers:
                stream, _ = servers[fd].accept()
                streams[stream.fileno()] = stream
                events.register(stream.fileno(), select.EPOLLIN)
            else:
                data = streams[fd].recv(65_536)
                if data:
                    streams[fd].sendall(data)
                else:
                    events.unregister(fd)
                    streams.pop(fd).close()


def allow_descriptors() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Load:
    """The work of the guest, and what went wrong."""

    def __init__(self, guest: Attachment, streams: list[vsockets.socket], listeners: int) -> None:
        self.guest = guest
        self.streams = streams
        self.listeners = listeners
        self.ended = threading.Event()
        self.problems: list[str] = []
        self.done = {"connects": 0, "binds": 0, "datagrams": 0, "messages": 0}
        self.longest = 0.0  #: seconds of a connect, since it was last set to 0
        work = (self._connect, self._bind, self.send, self._talk)
        self.threads = [threading.Thread(target=self._repeat, args=(one,)) for one in work]

    def _repeat(self, work: Callable[[], None]) -> None:
        try:
            while not self.ended.is_set():
                work()
        except BaseException as error:
            self.problems.append(f"{work.__name__}: {error!r}")

    def _connect(self) -> None:
        address = 2, _FIRST_PORT + random.randrange(self.listeners)
        begin = time.monotonic()
        with vsockets.create_connection(address, context=self.guest) as sock:
            self.longest = max(self.longest, time.monotonic() - begin)
            check(sock, os.urandom(8))
        self.done["connects"] += 1

    def _bind(self) -> None:
        vsockets.create_server((self.guest.cid, 5000), context=self.guest).close()
        self.done["binds"] += 1

    def send(self) -> None:
        """Send a datagram from a new socket, and check what comes back."""
        data = os.urandom(8)
        with vsockets.socket(AF_VSOCK, socket.SOCK_DGRAM, context=self.guest) as sock:
            sock.settimeout(20)
            sock.sendto(data, (2, _DATAGRAM_PORT))
            answer = sock.recvfrom(100)
        if answer != (data, (2, _DATAGRAM_PORT)):
            raise AssertionError(f"a datagram came back as {answer}")
        self.done["datagrams"] += 1

    def _talk(self) -> None:
        check(random.choice(self.streams), os.urandom(random.randrange(1, 10_000)))
        self.done["messages"] += 1


def check(sock: vsockets.socket, data: bytes) -> None:
    """Send data to be echoed, and check what comes back."""
    sock.sendall(data)
    came = b""
    while len(came) < len(data) and (more := sock.recv(65_536)):
        came += more
    if came != data:
        raise AssertionError(f"{len(data)} bytes came back as {len(came)}, or changed")


def measure(fabric: PrivateFabric) -> dict[str, int]:
    """Return what vsockd has, without what is closed by now; ``memory`` is in KiB."""
    fabric.control.sockets()
    status = fabric.control.status()
    process = Path(f"/proc/{status['pid']}/status").read_text()
    names = ("streams", "listeners", "datagram_sockets", "contexts", "descriptors")
    memory = int(process.partition("VmRSS:")[2].split()[0])
    return {name: status[name] for name in names} | {"memory": memory}


def kill(fabric: PrivateFabric) -> None:
    """Kill vsockd, and wait until its holder has started it again."""
    pid = fabric.control.status()["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: fabric.control.status()["pid"] != pid, "vsockd to be started again")


def report(what: str, pauses: list[float]) -> None:
    """Print the times in milliseconds."""
    if pauses:
        ordered = sorted(pauses)
        print(
            f"longest connect during {what}: median {statistics.median(pauses):.0f} ms, "
            f"99 of 100 below {ordered[max(0, len(ordered) * 99 // 100 - 1)]:.0f} ms, "
            f"all below {ordered[-1]:.0f} ms"
        )


def main(streams: int, listeners: int, replacements: int, kills: int) -> int:
    """Return 0 if nothing was lost."""
    allow_descriptors()
    restarts = 1_000_000 if kills else 0
    with (
        PrivateFabric(log_level="error", restarts=restarts) as fabric,
        contextlib.ExitStack() as stack,
    ):
        if kills:
            fabric.expect_errors()
        guest = fabric.guest(limits=_LIMITS)
        ready, written = os.pipe()
        server = os.fork()
        if not server:
            echo(fabric.host, listeners, written)
        os.read(ready, 1)
        opened = []
        for number in range(streams):
            address = 2, _FIRST_PORT + number % listeners
            opened.append(stack.enter_context(vsockets.create_connection(address, context=guest)))
        fabric.control.replace()
        load = Load(guest, opened, listeners)
        for _ in range(DATAGRAM_ROUTES_MAX + 1):  # as many routes back as the service keeps
            load.send()
        before = measure(fabric)
        for thread in load.threads:
            thread.start()
        pauses: list[float] = []
        killed: list[float] = []
        for number in range(replacements + kills):
            time.sleep(random.random() / 4)
            load.longest = 0.0
            if number < replacements:
                fabric.control.replace()
                time.sleep(0.05)
                pauses.append(load.longest * 1000)
            else:
                kill(fabric)
                time.sleep(0.05)
                killed.append(load.longest * 1000)
            if sys.stderr.isatty() or number % 10 == 9:
                done = f"{number + 1} of {replacements + kills}: {load.done}"
                print(done, file=sys.stderr, flush=True)
            if load.problems:
                break
        load.ended.set()
        for thread in load.threads:
            thread.join()
        for sock in opened:
            check(sock, b"still there")
        after = measure(fabric)
        os.kill(server, 9)
        os.waitpid(server, 0)
        stack.close()
        left = fabric.control.sockets()
    done = f"{len(pauses)} replacements, {len(killed)} kills: {load.done}"
    print(f"{streams:,} streams, {listeners:,} listeners, {done}")
    report("a replacement", pauses)
    report("a kill", killed)
    for name in before:
        print(f"{name}: {before[name]:,} before, {after[name]:,} after")
        if abs(after[name] - before[name]) > (before[name] // 5 if name == "memory" else 5):
            load.problems.append(f"{name} is not what it was")
    if left:
        load.problems.append(f"{len(left)} sockets are left, such as {left[0]}")
    print("\n".join(load.problems) or "nothing was lost")
    return 1 if load.problems else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Replace and kill vsockd under load.")
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--listeners", type=int, default=1_000)
    parser.add_argument("--replacements", type=int, default=100)
    parser.add_argument("--kills", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(main(arguments.streams, arguments.listeners, arguments.replacements, arguments.kills))
