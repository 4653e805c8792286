"""The AMQP proxy, which connects each session of a host proxy to a node of a RabbitMQ cluster.

To host proxies it is an HTTP/2 proxy for one service: a session is a CONNECT request whose
authority is the service's name.  The AMQP proxy chooses the node.
"""

from __future__ import annotations

import asyncio
import errno
import socket as stdlib
import ssl
from collections.abc import Awaitable, Iterable
from pathlib import Path

from ..eventloop.asyncio_server import AsyncioAcceptor, open_listener
from ..forward.client import Client
from ..forward.dialer import Dialer
from ..logs import by
from ..model.locator import Locator
from .frames import PROTOCOL_HEADER, begins_connection
from .http2 import ALPN, H2Connection, H2Stream
from .limits import (
    AMQP_NODE_CHECK_SECONDS,
    AMQP_NODE_CONNECT_TIMEOUT_SECONDS,
    AMQP_NODE_RECHECK_SECONDS,
    AMQP_OPEN_TIMEOUT_SECONDS,
    AMQP_PROXY_SESSIONS_MAX,
    AMQP_UPLINKS_MAX,
)
from .routing import AUTHORITY, BrokerNode, BrokerNodes, Headers, refusal, requester
from .session import SessionRelay, log


class AmqpProxy:
    """A server at ``listen`` that connects sessions to the nodes of a cluster.

    The constructor needs a running asyncio loop.
    """

    def __init__(
        self,
        listen: Locator,
        nodes: Iterable[Locator],
        *,
        authority: str = AUTHORITY,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Listen, and begin to check the nodes.

        Raises OSError when the proxy cannot listen on ``listen``.
        """
        self._authority = authority
        self._tls = tls
        self._nodes = BrokerNodes(nodes)
        self._dialer = Dialer()
        self._loop = asyncio.get_running_loop()
        self._connections: set[asyncio.Task[None]] = set()
        self._sessions: set[asyncio.Task[None]] = set()
        self._checks = [self._loop.create_task(self._check(node)) for node in self._nodes.all]
        self._acceptor = AsyncioAcceptor(
            listen,
            open_listener(listen, None),
            self._admit,
            has_room=lambda: len(self._connections) < AMQP_UPLINKS_MAX,
            reopen=lambda: open_listener(listen, None),
            log=log,
        )

    @property
    def where(self) -> str:
        """The address that host proxies connect to, as text without scheme."""
        assert self._acceptor.listener is not None
        return self._acceptor.listener.where

    async def drain(self) -> None:
        """Do nothing: host proxies close their clients' sessions when the connection ends."""

    def retire(self) -> Awaitable[object]:
        """Stop accepting: another process does.  Return an awaitable of the connections' end."""
        self._acceptor.close()
        return asyncio.gather(*self._connections, return_exceptions=True)

    def close(self) -> None:
        """Close the listener and abort every connection and session."""
        self._acceptor.close()
        for task in [*self._checks, *self._sessions, *self._connections]:
            task.cancel()

    # Connections from host proxies

    def _admit(self, sock: stdlib.socket) -> None:
        task = self._loop.create_task(self._serve(sock))
        self._connections.add(task)
        task.add_done_callback(self._on_connection_done)

    def _on_connection_done(self, task: asyncio.Task[None]) -> None:
        self._connections.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("internal error: a host proxy's connection was dropped", exc_info=error)
        self._acceptor.recheck_room()

    async def _serve(self, sock: stdlib.socket) -> None:
        client = Client(sock, log)
        try:
            _, connection = await self._loop.connect_accepted_socket(
                lambda: H2Connection(self._on_request),
                sock,
                ssl=self._tls,
                ssl_handshake_timeout=AMQP_OPEN_TIMEOUT_SECONDS if self._tls else None,
            )
        except OSError as error:
            client.log.warning("%s: %s", client.who, error.strerror or error)
            return
        client.log.info("%s: connected", client.who)
        try:
            why = await asyncio.shield(connection.closed)
            client.log.info("%s: ended%s", client.who, f": {why}" if why else "")
        finally:
            connection.close()

    # Sessions

    def _on_request(self, connection: H2Connection, stream: H2Stream, headers: Headers) -> None:
        status = refusal(headers, self._authority)
        if status is None and len(self._sessions) >= AMQP_PROXY_SESSIONS_MAX:
            status = 503
        if status is not None:
            log.warning("refused a session: status %d", status)
            connection.answer(stream, status)
            return
        task = self._loop.create_task(self._join(connection, stream, requester(headers)))
        self._sessions.add(task)
        task.add_done_callback(self._sessions.discard)

    async def _join(self, connection: H2Connection, stream: H2Stream, who: str) -> None:
        tried: list[BrokerNode] = []
        while not stream.is_closing() and (node := self._nodes.choose(tried)) is not None:
            tried.append(node)
            node.sessions += 1
            relay = SessionRelay()
            try:
                await self._connect_node(node, relay)
                log.info("%s: connected to %s", who, node.locator, extra=by(who))
                connection.answer(stream, 200)
                stream.set_protocol(relay.near)
                await relay.done
                log.info("%s: disconnected from %s", who, node.locator, extra=by(who))
                return
            except OSError as error:
                self._set_health(node, False, error)
            finally:
                relay.abort()
                node.sessions -= 1
        if not stream.is_closing():
            connection.answer(stream, 503)

    async def _connect_node(self, node: BrokerNode, relay: SessionRelay) -> None:
        sock = await self._dialer.connect(node.locator, timeout=AMQP_NODE_CONNECT_TIMEOUT_SECONDS)
        await self._loop.create_connection(lambda: relay.far, sock=sock)
        self._set_health(node, True)

    # Nodes

    async def _check(self, node: BrokerNode) -> None:
        """Check periodically whether ``node`` answers, until cancelled."""
        while True:
            try:
                await check_node(self._dialer, node.locator)
            except OSError as error:
                self._set_health(node, False, error)
            else:
                self._set_health(node, True)
            await asyncio.sleep(
                AMQP_NODE_CHECK_SECONDS if node.healthy else AMQP_NODE_RECHECK_SECONDS
            )

    def _set_health(self, node: BrokerNode, healthy: bool, why: OSError | None = None) -> None:
        if node.healthy != healthy:
            node.healthy = healthy
            text = f"node is down: {why.strerror or why}" if why else "node is up again"
            log.warning("%s: %s", node.locator, text)


async def check_node(dialer: Dialer, node: Locator) -> None:
    """Check that a node answers an AMQP protocol header with connection.start.

    Raises OSError if it does not, or cannot be reached.
    """
    loop = asyncio.get_running_loop()
    sock = await dialer.connect(node, timeout=AMQP_NODE_CONNECT_TIMEOUT_SECONDS)
    with sock:
        try:
            async with asyncio.timeout(AMQP_NODE_CONNECT_TIMEOUT_SECONDS):
                await loop.sock_sendall(sock, PROTOCOL_HEADER)
                answer = await loop.sock_recv(sock, 4096)
        except TimeoutError:
            raise OSError(errno.ETIMEDOUT, "connected, but received no AMQP frame") from None
    if not begins_connection(answer):
        raise OSError(
            errno.EPROTO,
            "the node did not greet as an AMQP 0-9-1 broker (expected connection.start)",
        )


def server_context(
    certificate: Path, key: Path | None = None, authority: Path | None = None
) -> ssl.SSLContext:
    """Return the TLS settings of the AMQP proxy's side.

    With ``authority``, a file of CA certificates, clients need a certificate that one of these has
    signed.  All files are PEM.

    Raises OSError if a file cannot be read or is invalid.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    if authority is not None:
        context.load_verify_locations(authority)
        context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols([ALPN])
    return context
