"""The server of ``vsock perf serve``, against which clients measure."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket as stdlib
import threading
import time
from collections import OrderedDict

from .._linux.descriptor_passing import guard_accepted
from ..attachment import ContextHandle
from ..eventloop.asyncio_server import Listener
from ..eventloop.rebind import REBIND_FIRST_PAUSE_SECONDS, lifeline
from ..eventloop.retry import Backoff
from ..limits import MAX_DATAGRAM
from ..model.constants import AF_VSOCK
from ..model.locator import Locator, Vsock
from .limits import PERF_RUNS_MAX, PERF_STREAMS_MAX
from .protocol import (
    REQUEST_SIZE,
    Header,
    Job,
    MessageKind,
    PerfProtocolError,
    PerfRequest,
    encode_count,
    set_timeouts,
)

log = logging.getLogger("vsockets.perf")

_BUFFER = max(MAX_DATAGRAM, 65_536)


class PerfServer:
    """A server of measurements on any number of locators.

    Each stream is served by a thread; their number is bounded.
    """

    def __init__(self, locators: list[Locator], context: ContextHandle | None = None) -> None:
        """Listen on all ``locators``.

        Raises OSError if one cannot be bound.
        """
        self.listeners: list[Listener] = []
        self._context = context
        self._closed = threading.Event()
        self._lines: dict[int, stdlib.socket] = {}
        self._slots = threading.BoundedSemaphore(PERF_STREAMS_MAX)
        try:
            for locator in locators:
                self.listeners.append(Listener(locator, context))
            for number, locator in enumerate(locators):
                self._start(number, locator)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Close all listeners."""
        self._closed.set()
        for listener in self.listeners:
            listener.close()
        for line in list(self._lines.values()):
            stdlib.socket.shutdown(line, stdlib.SHUT_RDWR)

    def _start(self, number: int, locator: Locator) -> None:
        """Serve a listener in threads, until it is closed or vsockd has ended.

        Raises OSError when vsockd cannot be reached.
        """
        sockets = self.listeners[number].sockets
        if isinstance(locator, Vsock) and locator.datagram:
            line = lifeline(self._context)
            if line is not None:
                self._lines[number] = line
                watch = threading.Thread(target=self._watch, args=(number, *sockets), daemon=True)
                watch.start()
        for sock in sockets:
            sock.setblocking(True)

            def serve(sock: stdlib.socket = sock) -> None:
                if sock.type == stdlib.SOCK_DGRAM:
                    self._datagrams(sock)
                else:
                    self._listen(sock)
                self._open_again(number, locator)

            threading.Thread(target=serve, daemon=True).start()

    def _watch(self, number: int, sock: stdlib.socket) -> None:
        """Wait for vsockd's end, and then wake the thread that receives from ``sock``."""
        with self._lines[number] as line, contextlib.suppress(OSError):
            stdlib.socket.recv(line, 1)
            del self._lines[number]
            stdlib.socket.shutdown(sock, stdlib.SHUT_RDWR)

    def _open_again(self, number: int, locator: Locator) -> None:
        """Listen on ``locator`` again once another vsockd serves, unless the server is closed."""
        if not self._closed.is_set():
            log.warning("%s: vsockd has ended", locator)
        self.listeners[number].close()
        backoff = Backoff(REBIND_FIRST_PAUSE_SECONDS)
        while not self._closed.wait(backoff.next_pause()):
            with contextlib.suppress(OSError):
                self.listeners[number] = Listener(locator, self._context)
                try:
                    self._start(number, locator)
                except OSError:
                    self.listeners[number].close()
                    raise
                log.warning("%s: listening again", locator)
                return

    def _listen(self, listener: stdlib.socket) -> None:
        while True:
            self._slots.acquire()
            try:
                sock, _ = listener.accept()
            except OSError as error:
                self._slots.release()
                if listener.fileno() < 0 or error.errno == errno.ENETDOWN:
                    return
                time.sleep(0.05)  # probably out of descriptors
                continue
            threading.Thread(target=self._serve, args=(guard_accepted(sock),), daemon=True).start()

    def _serve(self, sock: stdlib.socket) -> None:
        try:
            with sock, contextlib.suppress(OSError, PerfProtocolError):
                set_timeouts(sock)
                with contextlib.suppress(OSError):
                    sock.setsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY, 1)
                perform(receive_request(sock), sock)
        finally:
            self._slots.release()

    def _datagrams(self, sock: stdlib.socket) -> None:
        arrived: OrderedDict[tuple[object, int], int] = OrderedDict()
        while True:
            try:
                data, source = sock.recvfrom(_BUFFER)
            except OSError:
                if sock.fileno() < 0:
                    return
                continue  # an answer was refused
            if source is None and sock.family == AF_VSOCK:
                return  # vsockd has ended
            with contextlib.suppress(OSError, PerfProtocolError, TypeError):
                header = Header.decode(data)
                run = source, header.run
                if header.kind is MessageKind.DATA:
                    arrived[run] = arrived.get(run, 0) + 1
                    if len(arrived) > PERF_RUNS_MAX:
                        arrived.popitem(last=False)
                elif header.kind is MessageKind.PING:
                    sock.sendto(data, source)
                else:
                    count = arrived.get(run, 0)
                    sock.sendto(Header(MessageKind.REPORT, header.run, count).encode(), source)


def receive_request(sock: stdlib.socket) -> PerfRequest:
    """Read the request of a stream.

    Raises PerfProtocolError if the request is invalid, OSError if the client closes the stream.
    """
    data = b""
    while len(data) < REQUEST_SIZE:
        piece = sock.recv(REQUEST_SIZE - len(data))
        if not piece:
            break
        data += piece
    return PerfRequest.decode(data)


def perform(request: PerfRequest, sock: stdlib.socket) -> None:
    """Perform the requested job on a stream.

    Raises OSError when the client closes the stream early.
    """
    if request.job is Job.SINK:
        buffer = bytearray(request.size)
        count = 0
        while size := sock.recv_into(buffer):
            count += size
        sock.sendall(encode_count(count))
    elif request.job is Job.SOURCE:
        data = bytes(request.size)
        end = time.monotonic() + request.milliseconds / 1000
        while time.monotonic() < end:
            sock.sendall(data)
    elif request.job is Job.ECHO:
        while data := sock.recv(request.size):
            sock.sendall(data)
    else:
        sock.send(b"!")
