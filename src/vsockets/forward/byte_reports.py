"""Reports to vsockd of the bytes that a forwarder moves in its own streams."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket as stdlib
from itertools import islice
from typing import TYPE_CHECKING

from .._linux.sockets import cookie_of
from ..attachment import Attachment, ContextHandle, current
from ..model.constants import AF_VSOCK
from ..model.rates import REPORT_SECONDS, Moved
from ..protocol import client
from .limits import FORWARD_BYTE_REPORTS_MAX

if TYPE_CHECKING:
    from .pump import ForwardedConnection


class _Reported:
    """A joined connection, of which at least one end is a stream of the fabric."""

    def __init__(self, connection: ForwardedConnection, ends: list[tuple[bool, int, int]]) -> None:
        self.connection = connection
        self._ends = ends  # whether it is the first socket, its cookie, its inode
        self.moved = 0, 0

    def requests(self) -> list[bytes]:
        """Return the reports if bytes have moved since the last call."""
        moved = self.connection.moved
        if moved == self.moved:
            return []
        self.moved = moved
        forward, reverse = moved
        return [
            client.count(
                Moved(reverse, forward) if is_first else Moved(forward, reverse),
                cookie=cookie,
                inode=inode,
            )
            for is_first, cookie, inode in self._ends
        ]


class ByteReports:
    """Reports on the connections of a process, in the running asyncio loop."""

    def __init__(self, context: ContextHandle | None) -> None:
        """Report on the streams of ``context``, by default of this process's context."""
        self._loop = asyncio.get_running_loop()
        self._context = context
        self._connections: dict[ForwardedConnection, _Reported] = {}
        self._attachment: Attachment | None = None
        self._channel: stdlib.socket | None = None
        self._timer: asyncio.TimerHandle | None = None

    def add(
        self, connection: ForwardedConnection, one: stdlib.socket, other: stdlib.socket
    ) -> None:
        """Report a connection that joins two sockets, if one of them is a stream of the fabric."""
        ends = [
            (sock is one, cookie_of(sock), os.fstat(sock.fileno()).st_ino)
            for sock in (one, other)
            if sock.family == AF_VSOCK and sock.fileno() >= 0
        ]
        context = self._context or (current() if ends else None)
        if ends and isinstance(context, Attachment):
            self._attachment = context
            self._connections[connection] = _Reported(connection, ends)
            if self._timer is None:
                self._timer = self._loop.call_later(REPORT_SECONDS, self._report)

    def remove(self, connection: ForwardedConnection) -> None:
        """Stop reporting a connection; call this when it has ended."""
        self._connections.pop(connection, None)

    def close(self) -> None:
        """Stop all reports."""
        self._connections.clear()
        if self._timer is not None:
            self._timer.cancel()
        self._close_channel()

    def _report(self) -> None:
        self._timer = None
        # The other connections come first in the next second.
        for connection in list(islice(self._connections, FORWARD_BYTE_REPORTS_MAX)):
            reported = self._connections.pop(connection)
            self._connections[connection] = reported
            for request in reported.requests():
                self._send(request)
        if self._connections:
            self._timer = self._loop.call_later(REPORT_SECONDS, self._report)
        else:
            self._close_channel()

    def _send(self, request: bytes) -> None:
        assert self._attachment is not None
        try:
            if self._channel is None:
                self._channel = stdlib.socket(stdlib.AF_UNIX, stdlib.SOCK_SEQPACKET)
                self._channel.setblocking(False)
                self._attachment.open_channel(self._channel, stdlib.SOCK_SEQPACKET)
            self._channel.send(request)
        except BlockingIOError:
            pass  # vsockd is busy: the next report has the bytes
        except OSError:
            self._close_channel()  # vsockd has ended

    def _close_channel(self) -> None:
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.close()
            self._channel = None
