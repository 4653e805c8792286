"""The host proxy: every guest's sessions, over one TCP connection, to the AMQP proxy.

A guest is known by its CID, which it cannot forge: the proxy tells it to the far end in a header
of the request, and to the broker in the client's properties, and it decides what virtual hosts
the guest may use.
"""

from __future__ import annotations

import asyncio
import collections
import errno
import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ..attachment import ContextHandle
from ..forward.throttled_log import Client
from ..model.locator import Locator, Vsock
from .client_server import ClientServer
from .connect_request import AUTHORITY, connect_request
from .handshake_inspector import HandshakeInspector
from .limits import AMQP_GUEST_SESSIONS_MAX, AMQP_OPEN_TIMEOUT_SECONDS
from .session import AmqpSession
from .uplink import Uplink
from .virtual_hosts import VirtualHostRule, admits


class HostProxy(ClientServer):
    """Takes guests from ``listen`` to the AMQP proxy at ``proxy``."""

    def __init__(
        self,
        listen: Vsock,
        proxy: Locator,
        *,
        rules: Iterable[VirtualHostRule] = (),
        authority: str = AUTHORITY,
        tls: ssl.SSLContext | None = None,
        tls_name: str | None = None,
        context: ContextHandle | None = None,
    ) -> None:
        super().__init__(listen, context)
        self._rules = tuple(rules)
        self._authority = authority
        self._guests: collections.Counter[int] = collections.Counter()
        self._trunk = Uplink(proxy, tls, tls_name)

    @contextmanager
    def session_of(self, client: Client) -> Iterator[AmqpSession]:
        assert client.peer is not None
        cid, port = client.peer
        client.who = f"context {cid}, port {port}"
        if self._guests[cid] >= AMQP_GUEST_SESSIONS_MAX:
            raise OSError(errno.EDQUOT, f"it has {AMQP_GUEST_SESSIONS_MAX} sessions already")
        self._guests[cid] += 1
        guard = HandshakeInspector(cid, lambda name: admits(self._rules, cid, name))
        try:
            yield AmqpSession(client, guard)
        finally:
            self._guests[cid] -= 1
            if not self._guests[cid]:
                del self._guests[cid]

    async def reach(self, session: AmqpSession) -> None:
        assert session.guard is not None
        try:
            async with asyncio.timeout(AMQP_OPEN_TIMEOUT_SECONDS):
                link = await self._trunk.link()
                headers = connect_request(self._authority, session.guard.cid)
                await link.open(headers, session.far)
        except TimeoutError:
            raise OSError(errno.ETIMEDOUT, "the AMQP proxy did not answer in time") from None

    async def drain(self) -> None:
        await super().drain()
        self._trunk.close()

    def close(self) -> None:
        super().close()
        self._trunk.close()
