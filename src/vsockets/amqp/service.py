"""Running one of the proxies until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Protocol

from .._linux.rlimit import allow_many_descriptors
from .._linux.sd_notify import notify_ready
from ..eventloop.tasks import on_signals, wait_first
from ..logs import NOTICE
from ..model.locator import Locator
from .session import log


class Proxy(Protocol):
    """Any of the three."""

    @property
    def where(self) -> str:
        """Where clients come to."""

    async def drain(self) -> None:
        """See off who is there."""

    def close(self) -> None:
        """End everything now."""


def run(make: Callable[[], Proxy], listen: Locator) -> None:
    """Serve until SIGTERM or SIGINT; a second one ends it without ceremony.

    ``make`` is called in the loop, for a proxy at ``listen``.  Raises OSError.
    """
    allow_many_descriptors()

    async def serve() -> None:
        stopped, cut = asyncio.Event(), asyncio.Event()

        def stop() -> None:
            (cut if stopped.is_set() else stopped).set()

        on_signals({signal.SIGTERM: stop, signal.SIGINT: stop})
        proxy = make()
        try:
            scheme = str(listen).partition(":")[0]
            log.log(NOTICE, "listening on %s:%s", scheme, proxy.where)
            notify_ready()
            await stopped.wait()
            await wait_first(proxy.drain(), cut.wait())
        finally:
            proxy.close()

    asyncio.run(serve())
