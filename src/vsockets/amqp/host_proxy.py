"""The host proxy, which carries all guests' sessions over one TCP connection to the AMQP proxy.

A guest is identified by its CID, which it cannot forge.  The host proxy sends the CID to the AMQP
proxy in a request header and to the broker in the client properties, and uses it to decide which
virtual hosts the guest may open.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..attachment import ContextHandle
from ..eventloop.retry import Backoff
from ..forward.client import Client
from ..forward.dialer import Dialer
from ..model.locator import Inet, Locator, Vsock
from .guest_proxy import ClientServer
from .handshake_inspector import HandshakeInspector
from .http2 import ALPN, H2Connection
from .limits import (
    AMQP_GUEST_SESSIONS_MAX,
    AMQP_OPEN_TIMEOUT_SECONDS,
    AMQP_RETRY_FIRST_PAUSE_SECONDS,
    AMQP_RETRY_LONGEST_PAUSE_SECONDS,
)
from .routing import AUTHORITY, VirtualHostRule, admits, connect_request
from .session import AmqpSession, log


class Uplink:
    """A permanent HTTP/2 connection to ``locator``, with TLS if ``tls`` is given."""

    def __init__(
        self,
        locator: Locator,
        tls: ssl.SSLContext | None = None,
        tls_name: str | None = None,
    ) -> None:
        self._locator = locator
        self._tls = tls
        self._tls_name = tls_name or (locator.host if isinstance(locator, Inet) else None)
        self._dialer = Dialer()
        self._loop = asyncio.get_running_loop()
        self._connection: asyncio.Future[H2Connection] = self._loop.create_future()
        self._task = self._loop.create_task(self._stay_connected())
        self._task.add_done_callback(self._on_task_done)

    async def connection(self) -> H2Connection:
        """Wait until the connection is established, and return it."""
        return await asyncio.shield(self._connection)

    def close(self) -> None:
        """Close the connection and do not reconnect."""
        self._task.cancel()
        if self._connection.done():
            self._connection.result().close()

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: internal error: not reconnecting", self._locator, exc_info=error)

    async def _stay_connected(self) -> None:
        # The jitter keeps hosts from reconnecting at the same time.
        backoff = Backoff(
            AMQP_RETRY_FIRST_PAUSE_SECONDS, AMQP_RETRY_LONGEST_PAUSE_SECONDS, jitter=True
        )
        while True:
            why: object
            try:
                connection = await self._connect()
            except OSError as error:
                why = error.strerror or error
            else:
                log.info("%s: connected", self._locator)
                backoff.reset()
                self._connection.set_result(connection)
                why = await connection.closed
                self._connection = self._loop.create_future()
            log.warning("%s: %s; reconnecting", self._locator, why)
            await asyncio.sleep(backoff.next_pause())

    async def _connect(self) -> H2Connection:
        with contextlib.ExitStack() as stack:
            sock = await self._dialer.connect(self._locator, timeout=AMQP_OPEN_TIMEOUT_SECONDS)
            stack.callback(sock.close)
            _, connection = await self._loop.create_connection(
                H2Connection,
                sock=sock,
                ssl=self._tls,
                server_hostname=self._tls_name if self._tls else None,
                ssl_handshake_timeout=AMQP_OPEN_TIMEOUT_SECONDS if self._tls else None,
            )
            stack.pop_all()
        # A connection closes itself when the peer does not speak HTTP/2.
        await asyncio.wait(
            (connection.ready, connection.closed), return_when=asyncio.FIRST_COMPLETED
        )
        if connection.closed.done():
            raise OSError(0, str(connection.closed.result()))
        return connection


def client_context(
    authority: Path, certificate: Path | None = None, key: Path | None = None
) -> ssl.SSLContext:
    """Return the TLS settings of the host proxy's side.

    The AMQP proxy's certificate must be signed by ``authority``.  ``certificate`` is the host
    proxy's own; ``key`` may be in the same file.  All files are PEM.

    Raises OSError if a file cannot be read or is invalid.
    """
    context = ssl.create_default_context(cafile=authority)
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # RFC 9113, section 9.2
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    context.set_alpn_protocols([ALPN])
    return context


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
