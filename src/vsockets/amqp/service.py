"""The process of a guest proxy, host proxy or AMQP proxy."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from .._linux.process import allow_many_descriptors
from ..eventloop.service import run_service
from ..logs import NOTICE
from ..model.locator import Locator
from .session import log


class Proxy(Protocol):
    """The interface that guest proxy, host proxy and AMQP proxy have for :func:`run`."""

    @property
    def where(self) -> str:
        """The address that clients connect to, as text without scheme."""

    async def drain(self) -> None:
        """Stop accepting clients, and close each session with AMQP's connection.close."""

    def retire(self) -> Awaitable[object]:
        """Stop accepting clients; return an awaitable of the sessions' end."""

    def close(self) -> None:
        """Abort all sessions."""


def run(make: Callable[[], Proxy], listen: Locator) -> None:
    """Run a proxy until SIGTERM or SIGINT, then drain it; a second signal aborts the drain.

    ``make`` is called in the running loop and returns the proxy; ``listen`` is the proxy's locator,
    for the log.

    Raises OSError if the proxy cannot listen.
    """
    allow_many_descriptors()

    async def serve() -> None:
        proxy = make()

        def ready() -> None:
            scheme = str(listen).partition(":")[0]
            log.log(NOTICE, "listening on %s:%s", scheme, proxy.where)

        try:
            await run_service(ready, drain=proxy.drain, retire=proxy.retire)
        finally:
            proxy.close()

    asyncio.run(serve())
