"""The measurements, each against one server, and what comes out of them."""

from __future__ import annotations

import errno
import math
import os
import socket as stdlib
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .._linux.descriptor_passing import guard
from ..attachment import ContextHandle
from ..model.locator import Inet, Locator, Unix, Vsock, VsockMux
from ..protocol.hybrid import Answer, connect_line
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
)
from .timeouts import set_timeouts

#: How long to wait for the server's answer to a datagram before it counts as lost, in seconds,
#: and how often to ask what arrived.
_ANSWER = 0.5
_REPORTS = 5


@dataclass(frozen=True, slots=True)
class Result:
    """One measurement: a figure, and more about it."""

    name: str
    value: float
    unit: str
    more_is_better: bool = True
    details: dict[str, float] = field(default_factory=dict)


#: What is told of a series of times: the name and the share that took no longer.
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}


def percentiles(samples: array[int]) -> dict[str, float]:
    """Of nanoseconds, in microseconds; with the least and the most.  At least one sample."""
    ordered = sorted(samples)
    shares = {"min": 0.0, **PERCENTILES, "max": 1.0}
    # The least value that at least that share of all do not exceed.
    return {
        name: ordered[max(0, math.ceil(share * len(ordered)) - 1)] / 1000
        for name, share in shares.items()
    }


class Client:
    """Measures one locator; times are in seconds and sizes in bytes.

    Every measurement raises OSError when the server cannot be reached or stops, and
    PerfProtocolError when it is something else.
    """

    def __init__(self, locator: Locator, context: ContextHandle | None = None) -> None:
        self.locator = locator
        self._context = context

    # Streams

    def send(self, seconds: float, size: int) -> Result:
        """Throughput towards the server, until the server has read all of it."""
        with self._ask(PerfRequest(Job.SINK, size)) as sock:
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
        """Throughput from the server."""
        with self._ask(PerfRequest(Job.SOURCE, size, int(seconds * 1000))) as sock:
            buffer = bytearray(size)
            count = 0
            begin = time.perf_counter()
            while got := sock.recv_into(buffer):
                count += got
            took = time.perf_counter() - begin
        return Result("receive", count / took / 1e6, "MB/s", details={"bytes": count})

    def round_trip(self, seconds: float, size: int) -> Result:
        """A message there and back, one after the other."""
        samples = array("Q")
        with self._ask(PerfRequest(Job.ECHO, size)) as sock:
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
        """Connect, be greeted, and close, one after the other."""
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
        """As many datagrams as can be sent; the figure is what arrived."""
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
            arrived = self._report(sock, run)
        lost = max(0, sent - arrived)
        details = {"sent": sent, "lost": lost, "lost %": 100 * lost / max(1, sent)}
        details["MB/s"] = arrived * size / took / 1e6
        return Result("datagrams", arrived / took, "/s", details=details)

    def datagram_round_trip(self, seconds: float, size: int) -> Result:
        """A datagram there and back, one after the other; lost ones are not in the times."""
        run = int.from_bytes(os.urandom(8), "big")
        size = max(size, HEADER_SIZE)
        samples = array("Q")
        lost = number = 0
        with connect(self.locator, self._context) as sock:
            set_timeouts(sock, receive=_ANSWER)
            end = time.perf_counter_ns() + int(seconds * 1e9)
            before = 0
            while before < end and len(samples) < PERF_SAMPLES_MAX:
                number += 1
                data = Header(MessageKind.PING, run, number).encode(size)
                before = time.perf_counter_ns()
                sock.send(data)
                try:
                    while sock.recv(size) != data:
                        pass  # a late one
                except BlockingIOError:
                    lost += 1
                    continue
                samples.append(time.perf_counter_ns() - before)
        if not samples:
            raise OSError(errno.ETIMEDOUT, "the server answers no datagram")
        details = percentiles(samples) | {"lost": lost}
        return Result("datagram round trip", details["p50"], "us", False, details)

    # How it is done

    def _ask(self, request: PerfRequest) -> stdlib.socket:
        sock = connect(self.locator, self._context)
        sock.sendall(request.encode())
        return sock

    def _report(self, sock: stdlib.socket, run: int) -> int:
        """How many datagrams arrived; the server has read them when the answer no longer grows."""
        set_timeouts(sock, receive=_ANSWER)
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
            raise OSError(errno.ETIMEDOUT, "the server does not say what arrived")
        return known


def connect(locator: Locator, context: ContextHandle | None = None) -> stdlib.socket:
    """A connected socket, blocking in the kernel and not for ever.  Raises OSError."""
    kind = stdlib.SOCK_DGRAM if locator.datagram else stdlib.SOCK_STREAM
    match locator:
        case Vsock(cid, port):
            sock: stdlib.socket = guard(socket(type=kind, context=context))
            _or_close(sock, lambda: sock.connect((cid, port)))
        case Inet(host, port):
            sock = _connect_to_any(stdlib.getaddrinfo(host, port, type=kind))
            if not locator.datagram:
                sock.setsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY, 1)
        case Unix(path) | VsockMux(path):
            sock = guard(stdlib.socket(stdlib.AF_UNIX, kind))
            if locator.datagram:
                sock.bind("")  # a name of the kernel's choice, for answers to come to
            name = "\0" + path[1:] if path.startswith("@") else path
            _or_close(sock, lambda: connect_to(sock.connect, name))
            if isinstance(locator, VsockMux):
                _or_close(sock, lambda: _choose_port(sock, locator.port))
        case _:
            raise OSError(
                errno.EOPNOTSUPP, f"{locator}: expected vsock:, tcp:, unix: or vsock-mux:"
            )
    set_timeouts(sock)
    return sock


def _connect_to_any(found: Sequence[Any]) -> stdlib.socket:
    """Connect to the first address that answers."""
    for number, (family, kind, _, _, address) in enumerate(found, 1):
        sock = stdlib.socket(family, kind)
        try:
            sock.connect(address)
        except OSError:
            sock.close()
            if number == len(found):
                raise
        else:
            return sock
    raise AssertionError("getaddrinfo() returned no address")


def _or_close(sock: stdlib.socket, call: Callable[[], object]) -> None:
    try:
        call()
    except BaseException:
        sock.close()
        raise


def _choose_port(sock: stdlib.socket, port: int) -> None:
    set_timeouts(sock)
    sock.sendall(connect_line(port))
    answer = Answer()
    while answer.port is None:
        answer.take(sock.recv(1))


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
