"""The process of one AMQP proxy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from .._linux.rlimit import allow_many_descriptors
from ..eventloop.service import run_service
from ..logs import NOTICE
from ..model.locator import Locator
from .session import log


class Proxy(Protocol):
    """The interface of a guest proxy, host proxy or AMQP proxy."""

    @property
    def where(self) -> str:
        """Return the address that clients connect to."""

    async def drain(self) -> None:
        """Stop accepting, and close the sessions in an orderly way."""

    def close(self) -> None:
        """Abort all sessions."""


def run(make: Callable[[], Proxy], listen: Locator) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal aborts the drain.

    ``make`` creates the proxy, in the running loop; ``listen`` is its address, for the log.

    Raises OSError.
    """
    allow_many_descriptors()

    async def serve() -> None:
        proxy = make()

        def ready() -> None:
            scheme = str(listen).partition(":")[0]
            log.log(NOTICE, "listening on %s:%s", scheme, proxy.where)

        try:
            await run_service(ready, drain=proxy.drain)
        finally:
            proxy.close()

    asyncio.run(serve())
