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
from ..doors import Door, open_door
from ..entrance import DatagramEntrance
from .service import Service, log

_BUFFER = max(MAX_DATAGRAM, 65_536)


class Server:
    """Answers at locators in the running asyncio loop, one call after the other."""

    def __init__(
        self, service: Service, locators: Sequence[Locator], context: Place | None = None
    ) -> None:
        """Raises OSError."""
        self._entrances: list[DatagramEntrance] = []
        self._service = service
        try:
            for locator in locators:
                self._enter(locator, context)
        except OSError:
            self.close()
            raise

    @property
    def doors(self) -> list[Door]:
        """Where it answers, one for each locator."""
        return [entrance.door for entrance in self._entrances]

    def close(self) -> None:
        """Answer nobody any more."""
        for entrance in self._entrances:
            entrance.close()

    def _enter(self, locator: Locator, context: Place | None) -> None:
        door = open_door(locator, context)
        try:
            entrance = DatagramEntrance(
                locator,
                door,
                self._receive,
                reopen=lambda: open_door(locator, context),
                context=context,
                log=log,
            )
        except OSError:
            door.close()
            raise
        self._entrances.append(entrance)

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
