"""The host proxy's one TCP connection to the AMQP proxy, made again whenever it breaks."""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl

from ..forward.dialer import Dialer
from ..model.locator import Inet, Locator
from .h2_connection import H2Connection
from .limits import (
    AMQP_OPEN_TIMEOUT_SECONDS,
    AMQP_RETRY_FIRST_PAUSE_SECONDS,
    AMQP_RETRY_LONGEST_PAUSE_SECONDS,
)
from .session import log


class Uplink:
    """Keeps a link to ``locator``, with TLS if there is a context for it."""

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
        self._link: asyncio.Future[H2Connection] = self._loop.create_future()
        self._keeping = self._loop.create_task(self._keep())
        self._keeping.add_done_callback(self._kept)

    async def link(self) -> H2Connection:
        """A link, as soon as there is one."""
        return await asyncio.shield(self._link)

    def close(self) -> None:
        """Say goodbye, and keep it no longer."""
        self._keeping.cancel()
        if self._link.done():
            self._link.result().close()

    def _kept(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: given up", self._locator, exc_info=error)

    async def _keep(self) -> None:
        pause = AMQP_RETRY_FIRST_PAUSE_SECONDS
        while True:
            why: object
            try:
                link = await self._connect()
            except OSError as error:
                why = error.strerror or error
            else:
                log.info("%s: connected", self._locator)
                pause = AMQP_RETRY_FIRST_PAUSE_SECONDS
                self._link.set_result(link)
                why = await link.closed
                self._link = self._loop.create_future()
            log.warning("%s: %s; trying again", self._locator, why)
            # Not all hosts at the same time.
            await asyncio.sleep(random.uniform(pause / 2, pause))
            pause = min(pause * 2, AMQP_RETRY_LONGEST_PAUSE_SECONDS)

    async def _connect(self) -> H2Connection:
        with contextlib.ExitStack() as stack:
            sock = await self._dialer.connect(self._locator, timeout=AMQP_OPEN_TIMEOUT_SECONDS)
            stack.callback(sock.close)
            _, link = await self._loop.create_connection(
                H2Connection,
                sock=sock,
                ssl=self._tls,
                server_hostname=self._tls_name if self._tls else None,
                ssl_handshake_timeout=AMQP_OPEN_TIMEOUT_SECONDS if self._tls else None,
            )
            stack.pop_all()
        # A link gives itself up when there is nobody who speaks HTTP/2.
        await asyncio.wait((link.ready, link.closed), return_when=asyncio.FIRST_COMPLETED)
        if link.closed.done():
            raise OSError(0, str(link.closed.result()))
        return link
