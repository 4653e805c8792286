"""The AMQP proxy: splits the sessions of a host's one connection into connections to brokers.

It is an HTTP/2 proxy for one service: what CONNECT asks for is its name, and which node of the
cluster serves it is decided here.
"""

from __future__ import annotations

import asyncio
import errno
import socket as stdlib
import ssl
from collections.abc import Iterable

from ..eventloop.asyncio_server import AsyncioAcceptor
from ..eventloop.listeners import open_listener
from ..forward.dialer import Dialer
from ..forward.throttled_log import Client
from ..logs import by
from ..model.locator import Locator
from .brokers import BrokerNode, BrokerNodes
from .connect_request import AUTHORITY, Headers, refusal, who_asks
from .frames import PROTOCOL_HEADER, begins_connection
from .h2_connection import H2Connection
from .h2_stream import H2Stream
from .limits import (
    AMQP_NODE_CHECK_SECONDS,
    AMQP_NODE_CONNECT_TIMEOUT_SECONDS,
    AMQP_NODE_RECHECK_SECONDS,
    AMQP_OPEN_TIMEOUT_SECONDS,
    AMQP_PROXY_SESSIONS_MAX,
    AMQP_UPLINKS_MAX,
)
from .relay import SessionRelay
from .session import log


class AmqpProxy:
    """Takes the sessions that come to ``listen`` to nodes of a cluster; made in a running loop."""

    def __init__(
        self,
        listen: Locator,
        nodes: Iterable[Locator],
        *,
        authority: str = AUTHORITY,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Raises OSError when nobody can be let in there."""
        self._authority = authority
        self._tls = tls
        self._nodes = BrokerNodes(nodes)
        self._dialer = Dialer()
        self._loop = asyncio.get_running_loop()
        self._links: set[asyncio.Task[None]] = set()
        self._sessions: set[asyncio.Task[None]] = set()
        self._checks = [self._loop.create_task(self._check(node)) for node in self._nodes.all]
        self._entrance = AsyncioAcceptor(
            listen,
            open_listener(listen, None),
            self._enter,
            has_room=lambda: len(self._links) < AMQP_UPLINKS_MAX,
            reopen=lambda: open_listener(listen, None),
            log=log,
        )

    @property
    def where(self) -> str:
        """Where hosts come to."""
        assert self._entrance.door is not None
        return self._entrance.door.where

    async def drain(self) -> None:
        """Hosts see their clients off when their link ends: there is nothing to wait for."""

    def close(self) -> None:
        """End everything now."""
        self._entrance.close()
        for task in [*self._checks, *self._sessions, *self._links]:
            task.cancel()

    # Links

    def _enter(self, sock: stdlib.socket) -> None:
        task = self._loop.create_task(self._serve(sock))
        self._links.add(task)
        task.add_done_callback(self._left)

    def _left(self, task: asyncio.Task[None]) -> None:
        self._links.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a link was lost", exc_info=error)
        self._entrance.look_again()

    async def _serve(self, sock: stdlib.socket) -> None:
        client = Client(sock, log)
        try:
            _, link = await self._loop.connect_accepted_socket(
                lambda: H2Connection(self._requested),
                sock,
                ssl=self._tls,
                ssl_handshake_timeout=AMQP_OPEN_TIMEOUT_SECONDS if self._tls else None,
            )
        except OSError as error:
            client.log.warning("%s: %s", client.who, error.strerror or error)
            return
        client.log.info("%s: connected", client.who)
        try:
            why = await asyncio.shield(link.closed)
            client.log.info("%s: ended%s", client.who, f": {why}" if why else "")
        finally:
            link.close()

    # Sessions

    def _requested(self, link: H2Connection, tunnel: H2Stream, headers: Headers) -> None:
        status = refusal(headers, self._authority)
        if status is None and len(self._sessions) >= AMQP_PROXY_SESSIONS_MAX:
            status = 503
        if status is not None:
            log.warning("a request was answered with status %d", status)
            link.answer(tunnel, status)
            return
        task = self._loop.create_task(self._join(link, tunnel, who_asks(headers)))
        self._sessions.add(task)
        task.add_done_callback(self._sessions.discard)

    async def _join(self, link: H2Connection, tunnel: H2Stream, who: str) -> None:
        tried: list[BrokerNode] = []
        while not tunnel.is_closing() and (node := self._nodes.choose(tried)) is not None:
            tried.append(node)
            node.sessions += 1
            relay = SessionRelay()
            try:
                await self._reach(node, relay)
                log.info("%s: goes to %s", who, node.locator, extra=by(who))
                link.answer(tunnel, 200)
                tunnel.set_protocol(relay.near)
                await relay.done
                log.info("%s: has left %s", who, node.locator, extra=by(who))
                return
            except OSError as error:
                self._found(node, False, error)
            finally:
                relay.abort()
                node.sessions -= 1
        if not tunnel.is_closing():
            link.answer(tunnel, 503)

    async def _reach(self, node: BrokerNode, relay: SessionRelay) -> None:
        sock = await self._dialer.connect(node.locator, timeout=AMQP_NODE_CONNECT_TIMEOUT_SECONDS)
        await self._loop.create_connection(lambda: relay.far, sock=sock)
        self._found(node, True)

    # BrokerNodes

    async def _check(self, node: BrokerNode) -> None:
        """Ask a node again and again whether it serves."""
        while True:
            try:
                await ask(self._dialer, node.locator)
            except OSError as error:
                self._found(node, False, error)
            else:
                self._found(node, True)
            await asyncio.sleep(
                AMQP_NODE_CHECK_SECONDS if node.healthy else AMQP_NODE_RECHECK_SECONDS
            )

    def _found(self, node: BrokerNode, healthy: bool, why: OSError | None = None) -> None:
        if node.healthy != healthy:
            node.healthy = healthy
            text = f"does not serve: {why.strerror or why}" if why else "serves again"
            log.warning("%s: %s", node.locator, text)


async def ask(dialer: Dialer, node: Locator) -> None:
    """Return when a node has begun a connection as brokers do; raises OSError."""
    loop = asyncio.get_running_loop()
    sock = await dialer.connect(node, timeout=AMQP_NODE_CONNECT_TIMEOUT_SECONDS)
    with sock:
        try:
            async with asyncio.timeout(AMQP_NODE_CONNECT_TIMEOUT_SECONDS):
                await loop.sock_sendall(sock, PROTOCOL_HEADER)
                answer = await loop.sock_recv(sock, 4096)
        except TimeoutError:
            raise OSError(errno.ETIMEDOUT, "it accepts, and says nothing") from None
    if not begins_connection(answer):
        raise OSError(errno.EPROTO, "it does not speak AMQP 0-9-1")
