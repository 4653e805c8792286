"""The host proxy, which carries all guests' sessions over one TCP connection to the AMQP proxy.

A guest is identified by its CID, which it cannot forge.  The host proxy sends the CID to the AMQP
proxy in a request header and to the broker in the client properties, and uses it to decide which
virtual hosts the guest may open.
"""

from __future__ import annotations

import asyncio
import collections
import errno
import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ..attachment import ContextHandle
from ..forward.client import Client
from ..model.locator import Locator, Vsock
from .client_server import ClientServer
from .handshake_inspector import HandshakeInspector
from .limits import AMQP_GUEST_SESSIONS_MAX, AMQP_OPEN_TIMEOUT_SECONDS
from .routing import AUTHORITY, VirtualHostRule, admits, connect_request
from .session import AmqpSession
from .uplink import Uplink


class HostProxy(ClientServer):
    """A proxy that connects each guest's client at ``listen`` to the AMQP proxy at ``proxy``."""

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
        self._uplink = Uplink(proxy, tls, tls_name)

    @contextmanager
    def session_of(self, client: Client) -> Iterator[AmqpSession]:
        """Yield a session whose handshake is inspected; count it against its guest's limit."""
        assert client.peer is not None
        cid, port = client.peer
        client.who = f"context {cid}, port {port}"
        if self._guests[cid] >= AMQP_GUEST_SESSIONS_MAX:
            why = f"too many sessions (expected at most {AMQP_GUEST_SESSIONS_MAX} for a guest)"
            raise OSError(errno.EDQUOT, why)
        self._guests[cid] += 1
        inspector = HandshakeInspector(cid, lambda name: admits(self._rules, cid, name))
        try:
            yield AmqpSession(client, inspector)
        finally:
            self._guests[cid] -= 1
            if not self._guests[cid]:
                del self._guests[cid]

    async def reach(self, session: AmqpSession) -> None:
        """Connect the far side to a stream of the HTTP/2 connection."""
        assert session.inspector is not None
        try:
            async with asyncio.timeout(AMQP_OPEN_TIMEOUT_SECONDS):
                connection = await self._uplink.connection()
                headers = connect_request(self._authority, session.inspector.cid)
                await connection.open(headers, session.far)
        except TimeoutError:
            raise OSError(errno.ETIMEDOUT, "the AMQP proxy did not answer in time") from None

    async def drain(self) -> None:
        """Close each session with connection.close, then the HTTP/2 connection."""
        await super().drain()
        self._uplink.close()

    def close(self) -> None:
        """Abort all sessions, and close the HTTP/2 connection."""
        super().close()
        self._uplink.close()
