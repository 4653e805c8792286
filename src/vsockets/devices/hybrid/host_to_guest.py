"""Streams from programs of the fabric to somebody behind a unix socket of the host.

A program has connected to vsockd, whose end of that came here.  Its other end is what the program
has, and cannot be exchanged; so the two sockets are joined by a pump, inside the kernel.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from functools import partial

from ...splice import SplicedPair, SplicePump
from ..client import ConnectRequest, DeviceClient
from ..loop import DeviceLoop
from .connector import Connector, Done
from .limits import HYBRID_CONNECTIONS_MAX

#: epoll(7) tells of hang-ups whether asked or not.
_HANG_UP = 0


class _Stream(SplicedPair):
    """A joined pair, which tells when it has ended."""

    on_end: Callable[[], None]

    def finished(self, why: OSError | None) -> None:
        self.on_end()


class HostToGuest:
    """All of them; ``dial`` makes an attempt to reach a port."""

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
        """How many there are, those included that nobody has accepted yet."""
        return len(self._attempts) + len(self._pump.connections)

    def on_connect(self, request: ConnectRequest) -> None:
        """Somebody wants to connect."""
        if self.stream_count >= HYBRID_CONNECTIONS_MAX:
            self._refuse(request, errno.ECONNRESET)
            return
        make_connector = self._attempts[request] = self._make_connector(
            request.port, partial(self._complete, request)
        )
        # Should who connects not want it any more.
        self._loop.watch_for(request.sock.fileno(), lambda events: self._cancel(request), _HANG_UP)
        make_connector.start()

    def close(self) -> None:
        """End all of them."""
        for request in list(self._attempts):
            self._cancel(request)
        self._pump.close()

    def close_when_idle(self, idle: Callable[[], None]) -> None:
        """Call ``idle`` when there are none any more."""
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
            stream.on_end = self._check_idle
            self._pump.start(stream)

    def _refuse(self, request: ConnectRequest, code: int) -> None:
        self._fabric.settle(request, error=code)
        request.sock.close()
        self._check_idle()

    def _check_idle(self) -> None:
        if self._idle is not None and not self.stream_count:
            self._idle()
