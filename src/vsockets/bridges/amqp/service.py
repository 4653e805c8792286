"""Running one of the proxies until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Protocol

from ..running import allow_many_descriptors, first


class Proxy(Protocol):
    """Any of the three."""

    @property
    def where(self) -> str:
        """Where clients come to."""

    async def drain(self) -> None:
        """See off who is there."""

    def close(self) -> None:
        """End everything now."""


def run(make: Callable[[], Proxy], ready: Callable[[Proxy], None]) -> None:
    """Serve until SIGTERM or SIGINT; a second one ends it without ceremony.

    ``make`` is called in the loop, ``ready`` when the proxy listens.  Raises OSError.
    """
    allow_many_descriptors()

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        stopped, cut = asyncio.Event(), asyncio.Event()

        def stop() -> None:
            (cut if stopped.is_set() else stopped).set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        proxy = make()
        try:
            ready(proxy)
            await stopped.wait()
            await first(proxy.drain(), cut.wait())
        finally:
            proxy.close()

    asyncio.run(serve())
