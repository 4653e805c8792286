"""The host proxy's HTTP/2 connection to the AMQP proxy, which is restored when it is lost."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path

from ..eventloop.retry import Backoff
from ..forward.dialer import Dialer
from ..model.locator import Inet, Locator
from .http2 import ALPN, H2Connection
from .limits import (
    AMQP_OPEN_TIMEOUT_SECONDS,
    AMQP_RETRY_FIRST_PAUSE_SECONDS,
    AMQP_RETRY_LONGEST_PAUSE_SECONDS,
)
from .session import log


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

    Raises OSError.
    """
    context = ssl.create_default_context(cafile=authority)
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # RFC 9113, section 9.2
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    context.set_alpn_protocols([ALPN])
    return context
