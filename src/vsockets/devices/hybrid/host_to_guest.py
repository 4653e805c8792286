"""Streams from programs of the fabric to a listener behind a unix socket of the host.

vsockd passes the other end of the program's stream to the device.  A :class:`Connector` connects
to the unix socket, with or without hybrid vsock's handshake.  The program's socket cannot be
replaced, so the kernel splices the two sockets together.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Callable
from functools import partial
from socket import AF_UNIX, MSG_DONTWAIT, MSG_NOSIGNAL, MSG_PEEK, SOCK_NONBLOCK, SOCK_STREAM

from ..._linux.sockets import refuse_descriptors
from ...limits import HYBRID_LINE_MAX_BYTES
from ...protocol.hybrid import ClientHandshake
from ...splice import SplicedPair, SplicePump
from ..client import ConnectRequest, DeviceClient
from ..limits import HYBRID_CONNECT_TIMEOUT_SECONDS, HYBRID_CONNECTIONS_MAX, HYBRID_RETRY_SECONDS
from ..loop import DeviceLoop, Timer

log = logging.getLogger(__name__)

_PEEK_FLAGS = int(MSG_DONTWAIT | MSG_PEEK)
_RECEIVE_FLAGS = int(MSG_DONTWAIT)
_SEND_FLAGS = int(MSG_DONTWAIT | MSG_NOSIGNAL)

#: Errors of a path without a listener: one may be opened later.
_ABSENT = (FileNotFoundError, ConnectionRefusedError)

#: Callback for the outcome: the connected socket and 0, or None and an errno.
Done = Callable[[socket.socket | None, int], None]


class Connector:
    """Connection attempt that is retried while the port has no listener, for ``wait`` seconds.

    ``done`` is called once, unless :meth:`cancel` is called first: with the socket, or with
    ETIMEDOUT, ECONNRESET (no listener at the port) or EHOSTUNREACH (no listener at the unix
    socket).
    """

    def __init__(
        self, loop: DeviceLoop, path: str, port: int | None, wait: float, done: Done
    ) -> None:
        """Prepare to connect to the unix socket ``path``; a ``port`` is requested by handshake."""
        self._loop = loop
        self._path = path
        self._port = port
        self._done = done
        self._sock: socket.socket | None = None
        self._handshake: ClientHandshake | None = None
        self._retry_timer: Timer | None = None
        self._retrying = True
        self._timers = [loop.call_later(wait + HYBRID_CONNECT_TIMEOUT_SECONDS, self._time_out)]
        if wait:
            self._timers.append(loop.call_later(wait, self._stop_retrying))
        else:
            self._retrying = False

    def start(self) -> None:
        """Start the attempt; ``done`` may be called before this method returns."""
        try:
            sock = self._sock = socket.socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK)
            refuse_descriptors(sock)
            sock.connect(self._path)
            if self._port is None:
                self._finish(sock)
                return
            self._handshake = ClientHandshake(self._port)
            sock.send(self._handshake.request, _SEND_FLAGS)
            self._loop.watch(sock.fileno(), self._on_reply)
        except BlockingIOError:  # the backlog is full, and poll() does not report when it has room
            self._schedule_retry()
        except _ABSENT:
            self._fail(errno.ECONNRESET if self._port is None else errno.EHOSTUNREACH)
        except ConnectionError:  # closed between connect and send
            self._fail(errno.ECONNRESET)
        except OSError as error:
            log.warning("%s: %s", self._path, error.strerror)
            self._finish(None, errno.EHOSTUNREACH)

    def cancel(self) -> None:
        """Abandon the attempt without calling ``done``."""
        for timer in self._timers:
            timer.cancel()
        self._close()

    def _on_reply(self, events: int) -> None:
        sock, handshake = self._sock, self._handshake
        assert sock is not None
        assert handshake is not None
        try:
            # Receive the line only: the bytes after it are the guest's.
            size = handshake.take(sock.recv(HYBRID_LINE_MAX_BYTES, _PEEK_FLAGS))
            sock.recv(size, _RECEIVE_FLAGS)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno == errno.EPROTO:
                log.warning("%s: %s", self._path, error.strerror)
            self._fail(errno.ECONNRESET)
            return
        if handshake.port is not None:
            self._loop.unwatch(sock.fileno())
            self._finish(sock)

    def _fail(self, code: int) -> None:
        if self._retrying:
            self._schedule_retry()
        else:
            self._finish(None, code)

    def _schedule_retry(self) -> None:
        self._close()
        self._retry_timer = self._loop.call_later(HYBRID_RETRY_SECONDS, self.start)

    def _stop_retrying(self) -> None:
        self._retrying = False

    def _time_out(self) -> None:
        self._finish(None, errno.ETIMEDOUT)

    def _finish(self, sock: socket.socket | None, code: int = 0) -> None:
        if sock is not None:
            self._sock = None
        self.cancel()
        if code:
            log.info("%s: port %s: %s", self._path, self._port, os.strerror(code))
        self._done(sock, code)

    def _close(self) -> None:
        if self._retry_timer is not None:
            self._retry_timer.cancel()
            self._retry_timer = None
        if self._sock is not None:
            self._loop.unwatch(self._sock.fileno())
            self._sock.close()
            self._sock = None


#: No event but hang-ups, which epoll(7) always reports.
_HANG_UP = 0


class _Stream(SplicedPair):
    """A spliced pair of sockets that reports its end."""

    on_end: Callable[[], None]

    def finished(self, why: OSError | None) -> None:
        self.on_end()


class HostToGuest:
    """The host-to-guest streams of a device.

    ``make_connector`` prepares a connect to a port of the guest.
    """

    def __init__(
        self,
        loop: DeviceLoop,
        fabric: DeviceClient,
        make_connector: Callable[[int, Done], Connector],
    ) -> None:
        self._loop = loop
        self._fabric = fabric
        self._make_connector = make_connector
        self._pump = SplicePump(loop)
        self._attempts: dict[ConnectRequest, Connector] = {}
        self._idle: Callable[[], None] | None = None

    @property
    def stream_count(self) -> int:
        """Number of streams, pending connects included."""
        return len(self._attempts) + len(self._pump.connections)

    def on_connect(self, request: ConnectRequest) -> None:
        """Start the connect to the guest that a client has requested."""
        if self.stream_count >= HYBRID_CONNECTIONS_MAX:
            self._refuse(request, errno.ECONNRESET)
            return
        connector = self._attempts[request] = self._make_connector(
            request.port, partial(self._complete, request)
        )
        # The client may close while the connect is pending.
        self._loop.watch_for(request.sock.fileno(), lambda events: self._cancel(request), _HANG_UP)
        connector.start()

    def close(self) -> None:
        """Close all streams and abandon pending connects."""
        for request in list(self._attempts):
            self._cancel(request)
        self._pump.close()

    def close_when_idle(self, idle: Callable[[], None]) -> None:
        """Call ``idle`` when the last stream has ended, at once if no stream exists."""
        self._idle = idle
        self._check_idle()

    def _cancel(self, request: ConnectRequest) -> None:
        self._attempts[request].cancel()
        self._complete(request, None, errno.ECONNRESET)

    def _complete(self, request: ConnectRequest, sock: socket.socket | None, code: int) -> None:
        del self._attempts[request]
        self._loop.unwatch(request.sock.fileno())
        if sock is None:
            self._refuse(request, code)
        else:
            self._fabric.settle(request, request.sizes.size)
            stream = _Stream(self._pump, request.sock, sock)
            counted = request.port, request.peer
            stream.on_end = partial(self._end, counted)
            self._fabric.byte_reports.add(counted, lambda: stream.moved[::-1])
            self._pump.start(stream)

    def _end(self, stream: tuple[int, tuple[int, int]]) -> None:
        self._fabric.byte_reports.remove(stream)
        self._check_idle()

    def _refuse(self, request: ConnectRequest, code: int) -> None:
        self._fabric.settle(request, error=code)
        request.sock.close()
        self._check_idle()

    def _check_idle(self) -> None:
        if self._idle is not None and not self.stream_count:
            self._idle()
