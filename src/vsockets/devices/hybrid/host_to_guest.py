"""Streams from programs of the fabric to a listener behind a unix socket of the host.

vsockd passes its end of the program's stream to the device.  The program's socket cannot be
replaced, so the kernel splices the two sockets together.
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

#: epoll(7) reports hang-ups always.
_HANG_UP = 0


class _Stream(SplicedPair):
    """A spliced pair of sockets that reports its end."""

    on_end: Callable[[], None]

    def finished(self, why: OSError | None) -> None:
        self.on_end()


class HostToGuest:
    """The host-to-guest streams of a device.

    ``make_connector`` prepares one connect to a guest port.
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
        """Number of streams, including pending ones."""
        return len(self._attempts) + len(self._pump.connections)

    def on_connect(self, request: ConnectRequest) -> None:
        """Start a connect to the guest for a client."""
        if self.stream_count >= HYBRID_CONNECTIONS_MAX:
            self._refuse(request, errno.ECONNRESET)
            return
        make_connector = self._attempts[request] = self._make_connector(
            request.port, partial(self._complete, request)
        )
        # The client may close while the connect is pending.
        self._loop.watch_for(request.sock.fileno(), lambda events: self._cancel(request), _HANG_UP)
        make_connector.start()

    def close(self) -> None:
        """Close all streams and abandon pending connects."""
        for request in list(self._attempts):
            self._cancel(request)
        self._pump.close()

    def close_when_idle(self, idle: Callable[[], None]) -> None:
        """Call ``idle`` when the last stream has ended."""
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
