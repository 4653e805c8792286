"""The side of a measurement that does as it is told."""

from __future__ import annotations

import contextlib
import socket as stdlib
import threading
import time
from collections import OrderedDict

from ...attachment import Place
from ...limits import MAX_DATAGRAM, PERF_RUNS, PERF_STREAMS
from ...locator import Locator
from ...passing import guard_accepted
from ..doors import Door
from .protocol import (
    REQUEST_SIZE,
    Header,
    Job,
    Kind,
    ProtocolError,
    Request,
    encode_count,
)
from .timeouts import set_timeouts

_BUFFER = max(MAX_DATAGRAM, 65_536)


class Server:
    """Serves measurements on any number of locators until it is closed.

    A thread for each stream, a bounded number of them: clients measure one thing at a time.
    """

    def __init__(self, locators: list[Locator], context: Place | None = None) -> None:
        """Raises OSError."""
        self.doors: list[Door] = []
        self._slots = threading.BoundedSemaphore(PERF_STREAMS)
        try:
            for locator in locators:
                self.doors.append(Door(locator, context))
        except OSError:
            self.close()
            raise
        for door in self.doors:
            for sock in door.sockets:
                sock.setblocking(True)
                serve = self._datagrams if sock.type == stdlib.SOCK_DGRAM else self._listen
                threading.Thread(target=serve, args=(sock,), daemon=True).start()

    def close(self) -> None:
        """Let nobody in any more."""
        for door in self.doors:
            door.close()

    def _listen(self, listener: stdlib.socket) -> None:
        while True:
            self._slots.acquire()
            try:
                sock, _ = listener.accept()
            except OSError:
                self._slots.release()
                if listener.fileno() < 0:
                    return
                time.sleep(0.05)  # out of descriptors, most likely
                continue
            threading.Thread(target=self._serve, args=(guard_accepted(sock),), daemon=True).start()

    def _serve(self, sock: stdlib.socket) -> None:
        try:
            with sock, contextlib.suppress(OSError, ProtocolError):
                set_timeouts(sock)
                with contextlib.suppress(OSError):
                    sock.setsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY, 1)
                do(receive_request(sock), sock)
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
                continue  # an answer that found nobody
            with contextlib.suppress(OSError, ProtocolError, TypeError):
                header = Header.decode(data)
                run = source, header.run
                if header.kind is Kind.DATA:
                    arrived[run] = arrived.get(run, 0) + 1
                    if len(arrived) > PERF_RUNS:
                        arrived.popitem(last=False)
                elif header.kind is Kind.PING:
                    sock.sendto(data, source)
                else:
                    count = arrived.get(run, 0)
                    sock.sendto(Header(Kind.REPORT, header.run, count).encode(), source)


def receive_request(sock: stdlib.socket) -> Request:
    """The request a stream begins with.  Raises ProtocolError, OSError."""
    data = b""
    while len(data) < REQUEST_SIZE:
        piece = sock.recv(REQUEST_SIZE - len(data))
        if not piece:
            break
        data += piece
    return Request.decode(data)


def do(request: Request, sock: stdlib.socket) -> None:
    """Do what the client wants of this stream.  Raises OSError when it goes away."""
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
