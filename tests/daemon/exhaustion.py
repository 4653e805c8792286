"""Attacks on vsockd's descriptors, time and memory, and their effect on another guest.

``PYTHONPATH=tests python -m daemon.exhaustion`` prints, for each attack, how long another guest's
connects take meanwhile.  The tests of ``test_exhaustion.py`` run the same attacks.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import resource
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import vsockets
from vsockets import Attachment
from vsockets.protocol import RECORD_SIZE, Op, Request
from vsockets.testing import PrivateFabric

from .raw_client import (
    SIZES,
    adopt,
    ask,
    ask_for_route,
    bind,
    bind_datagram,
    connect,
    descriptors,
    enter,
    listen,
    send_with,
    unix_datagrams,
)
from .users import as_nobody

STREAM, SEQPACKET = socket.SOCK_STREAM, socket.SOCK_SEQPACKET

#: Port of the host's service, and CID of the guest whose connects are measured.
SERVICE, WITNESS = 9000, 9

#: CIDs of the attackers' guests.
ATTACKERS = (3, 4, 5, 6)

#: Longest life of an attacking process, in seconds.
LIFETIME = 120

#: Port of a guest's own listener.
OWN = 5000

#: The work of one process: prepare, call the argument, attack for ever.
Work = Callable[[Callable[[], None]], object]

#: Makes the processes of an attack, given its guests.
Attack = Callable[[list[Attachment]], list[Work]]


@contextlib.contextmanager
def processes(*works: Work) -> Iterator[None]:
    """Run each work in a forked process within this context, entered when all are prepared."""
    ready_reader, ready = os.pipe()
    start, start_writer = os.pipe()
    pids: list[int] = []
    try:
        for work in works:
            pid = os.fork()
            if pid == 0:
                _work(work, ready, start, start_writer)
            pids.append(pid)
        os.close(ready)
        for _ in works:
            assert os.read(ready_reader, 1), "a process has failed"
        os.close(start_writer)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(ready_reader)
        os.close(start)


def _work(work: Work, ready: int, start: int, start_writer: int) -> None:
    try:
        os.close(start_writer)
        signal.alarm(LIFETIME)
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

        def begin() -> None:
            os.write(ready, b"x")
            os.read(start, 1)

        work(begin)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


# Effect on another guest


@dataclass
class Latency:
    """Durations of connects, in seconds, and reasons of those that failed."""

    times: list[float]
    failed: Counter[str]

    def __str__(self) -> str:
        times = sorted(self.times)
        p50, p99, most = statistics.median(times), times[int(0.99 * len(times))], times[-1]
        failed = f" ({', '.join(self.failed)})" if self.failed else ""
        return (
            f"p50 {p50 * 1e3:6.1f} ms, p99 {p99 * 1e3:6.1f} ms, max {most * 1e3:6.1f} ms,"
            f" {len(times)} connects, {self.failed.total()} failed{failed}"
        )


def serve(host: Attachment, begin: Callable[[], None]) -> None:
    """Run the host's service, which accepts and closes."""
    with vsockets.create_server((2, SERVICE), context=host) as server:
        begin()
        while True:
            server.accept()[0].close()


def measure(fabric: PrivateFabric, seconds: float) -> Latency:
    """Connect from the witness to the host's service for ``seconds``."""
    guest = Attachment(fabric.folder / str(WITNESS))
    latency = Latency([], Counter())
    end = time.monotonic() + seconds
    while (begin := time.monotonic()) < end:
        with vsockets.socket(context=guest) as sock:
            code = sock.connect_ex((2, SERVICE))
            latency.times.append(time.monotonic() - begin)
            if not code:
                sock.settimeout(1.0)
                with contextlib.suppress(TimeoutError):  # not accepted yet
                    code = 0 if sock.recv(1) == b"" else errno.EPROTO
        if code:
            latency.failed[errno.errorcode[code]] += 1
        time.sleep(0.002)  # a guest as others are, not a benchmark
    return latency


@contextlib.contextmanager
def witnessed(fabric: PrivateFabric, **limits: int) -> Iterator[list[Attachment]]:
    """Run the host's service and the witness; yield the attackers' guests, with ``limits``."""
    fabric.guest(WITNESS)
    with processes(partial(serve, fabric.host)):
        yield [fabric.guest(cid, limits=limits) for cid in ATTACKERS]


# The attacks


def insist(guest: Attachment, kind: int = STREAM) -> socket.socket:
    """Connect to vsockd, repeatedly while its backlog is full."""
    while True:
        with contextlib.suppress(BlockingIOError):
            return enter(guest, kind)
        time.sleep(0.001)


def bound(guest: Attachment, number: int, kind: int = STREAM) -> list[socket.socket]:
    """Return bound sockets of the guest."""
    socks = []
    for _ in range(number):
        socks.append(insist(guest, kind))
        assert ask(socks[-1], bind()).status == 0
    return socks


def nothing(guests: list[Attachment]) -> list[Work]:
    """Do nothing."""
    return []


def routes(guests: list[Attachment], sockets: int = 300) -> list[Work]:
    """H4: request a route from each of ``sockets`` to each, and keep none of the descriptors."""
    guest = guests[0]

    def work(begin: Callable[[], None]) -> None:
        bound = [unix_datagrams() for _ in range(sockets)]
        ports = [adopt(guest, sock).local_port for sock in bound]
        begin()
        while True:
            for sock in bound:
                for port in ports[:256]:
                    with contextlib.suppress(OSError):
                        ask_for_route(guest, sock, (guest.cid, port)).close()

    return [work]


def datagram_sockets(guests: list[Attachment], number: int = 5000) -> list[Work]:
    """M2: four guests with as many datagram sockets as allowed, which request more."""

    def work(guest: Attachment, begin: Callable[[], None]) -> None:
        kept = []
        for _ in range(number):
            sock = unix_datagrams()
            if adopt(guest, sock).status:
                break
            kept.append(sock)
        begin()
        while True:
            with unix_datagrams() as sock:
                adopt(guest, sock)

    return [partial(work, guest) for guest in guests]


def streams_to_itself(guest: Attachment, number: int) -> list[socket.socket]:
    """Return a listener of the guest, and both ends of ``number`` streams to it."""
    server = vsockets.create_server((guest.cid, OWN), context=guest)
    ends: list[socket.socket] = [server]
    for _ in range(number):
        ends.append(vsockets.create_connection((guest.cid, OWN), context=guest))
        ends.append(server.accept()[0])
    return ends


def flood(socks: list[socket.socket], request: Request, burst: int = 1) -> None:
    """Send the same request on all connections, ``burst`` times before reading, for ever."""
    poll = select.epoll()
    by_number = {sock.fileno(): sock for sock in socks}
    data = request.encode()
    for sock in socks:
        sock.setblocking(False)
        poll.register(sock.fileno(), select.EPOLLIN)
        for _ in range(burst):
            sock.send(data)
    while True:
        for number, _ in poll.poll():
            with contextlib.suppress(BlockingIOError):
                if not by_number[number].recv(RECORD_SIZE):
                    poll.unregister(number)
                    continue
                by_number[number].send(data)


def bind_held(guests: list[Attachment], streams: int = 3900, connections: int = 100) -> list[Work]:
    """M1: BIND of a port held by a stream, pipelined on many connections."""
    guest = guests[0]

    def work(begin: Callable[[], None]) -> None:
        kept = streams_to_itself(guest, streams)
        held = kept[1].getsockname()[1]
        socks = [insist(guest, SEQPACKET) for _ in range(connections)]
        begin()
        flood(socks, bind(held))

    return [work]


def query(guests: list[Attachment], streams: int = 4000) -> list[Work]:
    """M1: QUERY with an inode, from four processes."""
    guest = guests[0]

    def hold(begin: Callable[[], None]) -> None:
        kept = streams_to_itself(guest, streams)
        begin()
        signal.pause()
        assert kept

    def work(begin: Callable[[], None]) -> None:
        begin()
        asked = Request(Op.QUERY, cookie=1, inode=1).encode()
        while True:
            socks = [insist(guest, SEQPACKET) for _ in range(50)]
            for sock in socks:
                sock.send(asked)
            for sock in socks:
                sock.recv(RECORD_SIZE)
                sock.close()

    return [hold, work, work, work, work]


def in_flight(guests: list[Attachment]) -> list[Work]:
    """M9: messages full of descriptors that no process receives."""

    def work(begin: Callable[[], None]) -> None:
        pairs = []
        with contextlib.suppress(OSError):  # ETOOMANYREFS, or for root's programs EMFILE
            while True:
                ours, theirs = socket.socketpair()
                pairs.append((ours, theirs))
                send_with(ours, b"x", [0] * 253)
        begin()
        signal.pause()

    return [work]


def deaf_listener(guests: list[Attachment]) -> list[Work]:
    """M9: a listener that has shut down receiving; four processes connect to it."""
    guest = guests[0]

    def server(begin: Callable[[], None]) -> None:
        def already() -> None:
            pass

        once = begin
        while True:
            with insist(guest) as sock:
                ask(sock, bind(6000))
                ask(sock, listen())
                sock.shutdown(socket.SHUT_RD)
                once()
                once = already
                poll = select.poll()
                poll.register(sock.fileno(), 0)
                poll.poll()

    def clients(begin: Callable[[], None]) -> None:
        begin()
        while True:
            with insist(guest) as sock:
                ask(sock, connect(guest.cid, 6000))

    return [server, clients, clients, clients, clients]


def many_channels(guests: list[Attachment], number: int = 4000) -> list[Work]:
    """Pipelined requests on as many bound connections as four guests may have."""

    def work(guest: Attachment, begin: Callable[[], None]) -> None:
        socks = bound(guest, number, SEQPACKET)
        begin()
        flood(socks, bind(), 4)

    return [partial(work, guest) for guest in guests]


def silence(guests: list[Attachment]) -> list[Work]:
    """Connections without a request, opened and closed as fast as possible."""

    def work(guest: Attachment, begin: Callable[[], None]) -> None:
        begin()
        while True:
            socks = [insist(guest) for _ in range(100)]
            for sock in socks:
                sock.close()

    return [partial(work, guest) for guest in guests]


def pending(guests: list[Attachment], number: int = 1000) -> list[Work]:
    """Guests at their limit of pending connects, with a listener each, request more."""

    def work(guest: Attachment, begin: Callable[[], None]) -> None:
        kept: list[socket.socket] = []
        for port in range(5000, 5000 + number):
            server, client = insist(guest), insist(guest)
            ask(server, bind(port))
            ask(server, listen())
            ask(client, connect(guest.cid, port))
            kept += [server, client]
        kept += [insist(guest) for _ in range(24)]
        begin()
        while True:
            with insist(guest) as sock, contextlib.suppress(OSError):
                ask(sock, connect(guest.cid, 5000))

    return [partial(work, guest) for guest in guests]


def updates(guests: list[Attachment], number: int = 19_000) -> list[Work]:
    """Connections with no request but an UPDATE, which has no reply."""

    def work(guest: Attachment, begin: Callable[[], None]) -> None:
        begin()
        kept: list[socket.socket] = []
        while len(kept) < number:
            sock = insist(guest)
            with contextlib.suppress(OSError):
                sock.send(Request(Op.UPDATE, 0, 0, 0, 0, 0, 0, *SIZES).encode())
            kept.append(sock)
        signal.pause()

    return [partial(work, guests[0])] * 2


def unread_answers(guests: list[Attachment], number: int = 4000) -> list[Work]:
    """Requests whose replies are not read, on as many connections as allowed."""

    def work(guest: Attachment, begin: Callable[[], None]) -> None:
        socks = bound(guest, number)
        for sock in socks:
            sock.setblocking(False)
        begin()
        while True:
            for sock in socks:
                with contextlib.suppress(OSError):
                    sock.send(bind().encode())

    return [partial(work, guest) for guest in guests]


def lingering_socket() -> tuple[socket.socket, socket.socket]:
    """Return a TCP socket whose last close takes an hour while its peer is open."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(65_536))
    return sock, peer


def slow_to_close(guests: list[Attachment], number: int = 50) -> list[Work]:
    """Descriptors that are not datagram sockets, queued behind ``number`` that close slowly."""

    def work(guest: Attachment, begin: Callable[[], None]) -> None:
        kept: list[socket.socket] = []
        slow = []
        for _ in range(number):
            lingers, peer = lingering_socket()
            ours, theirs = socket.socketpair()
            send_with(ours, b"x", [lingers.fileno()])  # where SO_LINGER cannot be taken back
            lingers.close()
            kept.append(peer)
            slow.append(theirs)
        begin()
        while kept:
            with insist(guest, SEQPACKET) as sock, contextlib.suppress(OSError):
                fd = slow.pop().detach() if slow else os.dup(0)
                send_with(sock, bind_datagram().encode(), [fd])
                os.close(fd)
                sock.recv(RECORD_SIZE)

    return [partial(work, guests[0])]


def slow_one_after_the_other(guests: list[Attachment]) -> list[Work]:
    """Requests that each carry a descriptor that closes slowly."""

    def work(guest: Attachment, kind: int, begin: Callable[[], None]) -> None:
        begin()
        kept = []
        while True:
            slow, peer = lingering_socket()
            with insist(guest, kind) as sock, contextlib.suppress(OSError):
                send_with(sock, Request(Op.LOCAL_CID).encode(), [slow.fileno()])
                slow.close()
                sock.recv(RECORD_SIZE)
            kept.append(peer)

    return [partial(work, guests[0], STREAM), partial(work, guests[1], SEQPACKET)]


def lingering_sockets(number: int, peers: list[socket.socket]) -> list[socket.socket]:
    """Return sockets as :func:`lingering_socket` does, with small buffers: many in a short time."""
    sockets = []
    for _ in range(number):
        with socket.socket() as server, contextlib.suppress(OSError):  # EMFILE, after a while
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            server.bind(("127.0.0.1", 0))
            server.listen()
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
            sock.connect(server.getsockname())
            peers.append(server.accept()[0])
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.send(bytes(65_536))
            sockets.append(sock)
    return sockets


def send_lingering(sock: socket.socket, slow: socket.socket) -> None:
    """Send a request with ``slow``, and close it: the request has its last descriptor."""
    with slow, contextlib.suppress(OSError):
        send_with(sock, Request(Op.LOCAL_CID).encode(), [slow.fileno()])


def slow_on_kept_connections(guests: list[Attachment], number: int = 100) -> list[Work]:
    """Requests on many connections of four guests, each with a descriptor that closes slowly."""

    def work(guest: Attachment, begin: Callable[[], None]) -> None:
        socks = bound(guest, number, SEQPACKET)
        for sock in socks:
            sock.setblocking(False)
        peers: list[socket.socket] = []
        slow = lingering_sockets(number, peers)
        begin()
        while True:
            for sock, lingers in zip(socks, slow, strict=False):
                send_lingering(sock, lingers)
            slow = lingering_sockets(number, peers)
            for sock in socks:
                with contextlib.suppress(OSError):
                    while sock.recv(RECORD_SIZE):
                        pass

    return [partial(work, guest) for guest in guests]


def slow_on_new_connections(guests: list[Attachment], number: int = 100) -> list[Work]:
    """The same with a connection for each request."""

    def work(guest: Attachment, begin: Callable[[], None]) -> None:
        peers: list[socket.socket] = []
        begin()
        while True:
            socks = []
            for lingers in lingering_sockets(number, peers):
                socks.append(insist(guest, SEQPACKET))
                send_lingering(socks[-1], lingers)
            for sock in socks:
                sock.close()

    return [partial(work, guest) for guest in guests]


def slow_on_closed_connections(guests: list[Attachment], number: int = 100) -> list[Work]:
    """The same on connections that are closed before the request is read."""

    def work(guest: Attachment, begin: Callable[[], None]) -> None:
        peers: list[socket.socket] = []
        begin()
        while True:
            slow = lingering_sockets(number, peers)
            for sock, lingers in zip(bound(guest, number, SEQPACKET), slow, strict=False):
                send_lingering(sock, lingers)
                sock.close()

    return [partial(work, guest) for guest in guests]


ATTACKS: dict[str, Attack] = {
    "nothing": nothing,
    "H4 routes": routes,
    "M2 datagram sockets": datagram_sockets,
    "M1 bind of a held port": bind_held,
    "M1 query": query,
    "M9 descriptors in flight": in_flight,
    "M9 deaf listener": deaf_listener,
    "requests on many channels": many_channels,
    "silent connections": silence,
    "pending connects": pending,
    "updates": updates,
    "unread answers": unread_answers,
    "slow to close": slow_to_close,
    "slow one after the other": slow_one_after_the_other,
    "slow on kept connections": slow_on_kept_connections,
    "slow on new connections": slow_on_new_connections,
    "slow on closed ones": slow_on_closed_connections,
}

#: Attacks on a vsockd without privileges, by its own user.
OF_A_USER = ("M9 descriptors in flight",)


def main() -> int:
    """Run the attacks one after the other, each against its own vsockd."""
    parser = argparse.ArgumentParser(prog="python -m daemon.exhaustion", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each (%(default)s)")
    parser.add_argument("--only", default="", help="only attacks whose name contains this")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name, attack in ATTACKS.items():
        if arguments.only not in name:
            continue
        if arguments.inside:
            _run(name, attack, arguments.seconds)
        else:
            command = [sys.executable, "-m", "daemon.exhaustion", "--inside", "--only", name]
            command += ["--seconds", str(arguments.seconds)]
            # Its errors are those of attackers that were refused.
            subprocess.run(
                as_nobody(*command) if name in OF_A_USER else command,
                stderr=subprocess.DEVNULL,
                check=False,
            )
    return 0


def _run(name: str, attack: Attack, seconds: float) -> None:
    with PrivateFabric(log_level="warning") as fabric:
        fabric.expect_errors()
        with witnessed(fabric) as guests:
            before = descriptors(fabric.pid)
            with processes(*attack(guests)):
                latency = measure(fabric, seconds)
                during = descriptors(fabric.pid)
        print(
            f"{name:26} {latency}; descriptors {before}, {during}; log {len(fabric.log)} bytes",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
