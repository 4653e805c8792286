"""The guest proxy, which runs in a guest and which stock AMQP clients connect to as the broker.

Each client's connection becomes one stream to the host proxy, and one session there.  This module
imports the standard library only, because a guest may have nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..attachment import ContextHandle
from ..forward.client import Client
from ..forward.dialer import Dialer
from ..model.locator import Locator
from .client_server import ClientServer
from .limits import AMQP_OPEN_TIMEOUT_SECONDS
from .session import AmqpSession


class GuestProxy(ClientServer):
    """A proxy that connects each client of ``listen`` to the host proxy at ``host``."""

    def __init__(
        self, listen: Locator, host: Locator, context: ContextHandle | None = None
    ) -> None:
        super().__init__(listen, context)
        self._host = host
        self._dialer = Dialer(context)

    @contextmanager
    def session_of(self, client: Client) -> Iterator[AmqpSession]:
        """Yield a session without inspection: the host proxy inspects it."""
        yield AmqpSession(client)

    async def reach(self, session: AmqpSession) -> None:
        """Connect the far side to the host proxy."""
        sock = await self._dialer.connect(
            self._host, timeout=AMQP_OPEN_TIMEOUT_SECONDS, wait=AMQP_OPEN_TIMEOUT_SECONDS
        )
        await self._loop.create_connection(lambda: session.far, sock=sock)
