"""The measurements of ``vsock perf run``, each against one server, and their results."""

from __future__ import annotations

import errno
import math
import os
import socket as stdlib
import time
from array import array
from dataclasses import dataclass, field

from .._linux.descriptor_passing import guard
from .._linux.sockets import closed_on_failure, connect_to_any
from ..attachment import ContextHandle
from ..model.locator import Inet, Locator, Unix, Vsock, VsockMux
from ..protocol.hybrid import ClientHandshake
from ..socket import socket
from ..state_folder import connect_to
from .limits import PERF_SAMPLES_MAX
from .protocol import (
    COUNT_SIZE,
    HEADER_SIZE,
    Header,
    Job,
    MessageKind,
    PerfProtocolError,
    PerfRequest,
    decode_count,
    set_timeouts,
)

#: Seconds after which an unanswered datagram counts as lost, and number of REPORT attempts.
_ANSWER_SECONDS = 0.5
_REPORTS = 5


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one measurement: its main figure and details."""

    name: str
    value: float
    unit: str
    more_is_better: bool = True
    details: dict[str, float] = field(default_factory=dict)


#: Reported percentiles: the name, and the share of samples that are not above the value.
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}


def percentiles(samples: array[int]) -> dict[str, float]:
    """Return percentiles, minimum and maximum in microseconds, by name.

    ``samples`` are in nanoseconds, at least one.
    """
    ordered = sorted(samples)
    shares = {"min": 0.0, **PERCENTILES, "max": 1.0}
    # The least value that at least this share of the samples do not exceed.
    return {
        name: ordered[max(0, math.ceil(share * len(ordered)) - 1)] / 1000
        for name, share in shares.items()
    }


class PerfClient:
    """A client for measurements against the server at ``locator``.

    Times are in seconds and sizes in bytes.  Every measurement raises OSError when the server
    cannot be reached or stops, and PerfProtocolError when the peer is not such a server.
    """

    def __init__(self, locator: Locator, context: ContextHandle | None = None) -> None:
        self.locator = locator
        self._context = context

    # Streams

    def send(self, seconds: float, size: int) -> Result:
        """Measure the throughput to the server, which reports the number of bytes received."""
        with self._request(PerfRequest(Job.SINK, size)) as sock:
            data = bytes(size)
            begin = time.perf_counter()
            end = begin + seconds
            while time.perf_counter() < end:
                sock.sendall(data)
            sock.shutdown(stdlib.SHUT_WR)
            count = decode_count(_receive(sock, COUNT_SIZE))
            took = time.perf_counter() - begin
        return Result("send", count / took / 1e6, "MB/s", details={"bytes": count})

    def receive(self, seconds: float, size: int) -> Result:
        """Measure the throughput from the server."""
        with self._request(PerfRequest(Job.SOURCE, size, int(seconds * 1000))) as sock:
            buffer = bytearray(size)
            count = 0
            begin = time.perf_counter()
            while got := sock.recv_into(buffer):
                count += got
            took = time.perf_counter() - begin
        return Result("receive", count / took / 1e6, "MB/s", details={"bytes": count})

    def round_trip(self, seconds: float, size: int) -> Result:
        """Measure the round-trip time of a message on a stream."""
        samples = array("Q")
        with self._request(PerfRequest(Job.ECHO, size)) as sock:
            message = bytes(size)
            end = time.perf_counter_ns() + int(seconds * 1e9)
            before = 0
            while before < end and len(samples) < PERF_SAMPLES_MAX:
                before = time.perf_counter_ns()
                sock.send(message)
                _receive(sock, size)
                samples.append(time.perf_counter_ns() - before)
        details = percentiles(samples)
        return Result("round trip", details["p50"], "us", False, details)

    def connects(self, seconds: float, size: int) -> Result:
        """Measure the rate of connections that are opened, greeted and closed in sequence."""
        samples = array("Q")
        request = PerfRequest(Job.GREET, size).encode()
        begin = before = time.perf_counter_ns()
        end = begin + int(seconds * 1e9)
        while before < end and len(samples) < PERF_SAMPLES_MAX:
            before = time.perf_counter_ns()
            with connect(self.locator, self._context) as sock:
                sock.send(request)
                while sock.recv(16):
                    pass
            samples.append(time.perf_counter_ns() - before)
        took = (time.perf_counter_ns() - begin) / 1e9
        return Result("connects", len(samples) / took, "/s", details=percentiles(samples))

    # Datagrams

    def datagrams(self, seconds: float, size: int) -> Result:
        """Send datagrams at full speed; the figure is the rate of received datagrams."""
        run = int.from_bytes(os.urandom(8), "big")
        size = max(size, HEADER_SIZE)
        data = Header(MessageKind.DATA, run).encode(size)
        sent = 0
        with connect(self.locator, self._context) as sock:
            begin = time.perf_counter()
            end = begin + seconds
            while time.perf_counter() < end:
                try:
                    sock.send(data)
                except OSError as error:
                    if error.errno not in (errno.ENOBUFS, errno.EAGAIN):
                        raise
                    continue
                sent += 1
            took = time.perf_counter() - begin
            arrived = self._received_count(sock, run)
        lost = max(0, sent - arrived)
        details = {"sent": sent, "lost": lost, "lost %": 100 * lost / max(1, sent)}
        details["MB/s"] = arrived * size / took / 1e6
        return Result("datagrams", arrived / took, "/s", details=details)

    def datagram_round_trip(self, seconds: float, size: int) -> Result:
        """Measure the round-trip time of datagrams; lost ones are counted, not timed."""
        run = int.from_bytes(os.urandom(8), "big")
        size = max(size, HEADER_SIZE)
        samples = array("Q")
        lost = number = 0
        with connect(self.locator, self._context) as sock:
            set_timeouts(sock, receive=_ANSWER_SECONDS)
            end = time.perf_counter_ns() + int(seconds * 1e9)
            before = 0
            while before < end and len(samples) < PERF_SAMPLES_MAX:
                number += 1
                data = Header(MessageKind.PING, run, number).encode(size)
                before = time.perf_counter_ns()
                sock.send(data)
                try:
                    while sock.recv(size) != data:
                        pass  # a late answer to an earlier datagram
                except BlockingIOError:
                    lost += 1
                    continue
                samples.append(time.perf_counter_ns() - before)
        if not samples:
            raise OSError(errno.ETIMEDOUT, "no datagram was answered")
        details = percentiles(samples) | {"lost": lost}
        return Result("datagram round trip", details["p50"], "us", False, details)

    def _request(self, request: PerfRequest) -> stdlib.socket:
        sock = connect(self.locator, self._context)
        sock.sendall(request.encode())
        return sock

    def _received_count(self, sock: stdlib.socket, run: int) -> int:
        """Return the number of datagrams of ``run`` that the server has received.

        The server is asked until two answers in a row are equal: then its queue is empty.
        """
        set_timeouts(sock, receive=_ANSWER_SECONDS)
        known = -1
        for number in range(_REPORTS):
            try:
                sock.send(Header(MessageKind.REPORT, run, number).encode())
                answer = Header.decode(sock.recv(65_536))
            except BlockingIOError:
                continue
            if answer.number == known:
                return known
            known = answer.number
        if known < 0:
            raise OSError(errno.ETIMEDOUT, "the server does not answer REPORT")
        return known


def connect(locator: Locator, context: ContextHandle | None = None) -> stdlib.socket:
    """Return a blocking socket connected to ``locator``, with timeouts of the kernel.

    Raises OSError if the connect fails.
    """
    kind = stdlib.SOCK_DGRAM if locator.datagram else stdlib.SOCK_STREAM
    match locator:
        case Vsock(cid, port):
            sock: stdlib.socket = guard(socket(type=kind, context=context))
            with closed_on_failure(sock):
                sock.connect((cid, port))
        case Inet(host, port):
            found = stdlib.getaddrinfo(host, port, type=kind)
            sock = connect_to_any(kind, [(family, address) for family, *_, address in found])
            if not locator.datagram:
                sock.setsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY, 1)
        case Unix(path) | VsockMux(path):
            sock = guard(stdlib.socket(stdlib.AF_UNIX, kind))
            if locator.datagram:
                sock.bind("")  # a name that the kernel chooses, for the answers
            name = "\0" + path[1:] if path.startswith("@") else path
            with closed_on_failure(sock):
                connect_to(sock.connect, name)
                if isinstance(locator, VsockMux):
                    _choose_port(sock, locator.port)
        case _:
            raise OSError(
                errno.EOPNOTSUPP, f"{locator}: expected vsock:, tcp:, unix: or vsock-mux:"
            )
    set_timeouts(sock)
    return sock


def _choose_port(sock: stdlib.socket, port: int) -> None:
    set_timeouts(sock)
    handshake = ClientHandshake(port)
    sock.sendall(handshake.request)
    while handshake.port is None:
        handshake.take(sock.recv(1))


def _receive(sock: stdlib.socket, size: int) -> bytes:
    data = sock.recv(size)
    while data and len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            break
        data += piece
    if not data:
        raise PerfProtocolError("the server has closed the stream")
    return data
