"""The server's sockets: datagrams in, datagrams out."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket as stdlib
from collections.abc import Callable, Sequence

from ...attachment import Place
from ...limits import FORWARD_ACCEPTS, MAX_DATAGRAM
from ...locator import Locator
from ...service_manager import notify_ready
from ..doors import Door
from .service import Service

_BUFFER = max(MAX_DATAGRAM, 65_536)


class Server:
    """Answers at locators in the running asyncio loop, one call after the other."""

    def __init__(
        self, service: Service, locators: Sequence[Locator], context: Place | None = None
    ) -> None:
        """Raises OSError."""
        self.doors: list[Door] = []
        self._service = service
        self._loop = asyncio.get_running_loop()
        try:
            for locator in locators:
                self.doors.append(Door(locator, context))
        except OSError:
            self.close()
            raise
        for door in self.doors:
            for sock in door.sockets:
                self._loop.add_reader(sock.fileno(), self._receive, sock)

    def close(self) -> None:
        """Answer nobody any more."""
        for door in self.doors:
            for sock in door.sockets:
                self._loop.remove_reader(sock.fileno())
            door.close()

    def _receive(self, sock: stdlib.socket) -> None:
        for _ in range(FORWARD_ACCEPTS):
            try:
                data, source = sock.recvfrom(_BUFFER)
            except OSError:  # nothing more, or an earlier answer did not arrive
                return
            if not isinstance(source, tuple):
                continue  # a client without an address cannot be answered
            reply = self._service.answer(data, source)
            if reply is not None:
                with contextlib.suppress(OSError):  # he asks again
                    sock.sendto(reply, source)


async def serve(
    service: Service,
    locators: Sequence[Locator],
    context: Place | None,
    opened: Callable[[Server], None],
) -> None:
    """Serve until SIGTERM or SIGINT; ``opened`` hears when clients can come.  Raises OSError."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    server = Server(service, locators, context)
    try:
        opened(server)
        notify_ready()
        await ended.wait()
    finally:
        server.close()
