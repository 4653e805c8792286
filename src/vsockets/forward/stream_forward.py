"""A forward of streams: accept a client, authorize it, connect the target, join the two."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket as stdlib
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from ..eventloop.asyncio_server import AsyncioAcceptor
from ..eventloop.loop import OUT_OF_RESOURCES
from ..model.locator import Inet, Proxy
from .client import Client, log
from .dialer import Dialer, NotAdmitted
from .fairness import Shares
from .limits import FORWARD_PROXY_TIMEOUT_SECONDS
from .proxies import BadRequest, ProxyProtocol, ProxyRefusal, Socks5
from .settings import HostRules, Settings, admits_peer

if TYPE_CHECKING:
    from ..capture import Recorder
    from ..eventloop.asyncio_server import Listener
    from .byte_reports import ByteReports
    from .pump import AsyncioSplicePump


class StreamForward:
    """A forward of streams in the running asyncio loop.

    ``settings`` may be replaced at any time; established connections keep their settings.
    Without a ``listener`` the source is a single stream (standard input or a program).
    After vsockd's end, ``reopen`` returns a new vSockets listener.
    """

    def __init__(
        self,
        settings: Settings,
        listener: Listener | None,
        pump: AsyncioSplicePump,
        byte_reports: ByteReports,
        dialer: Dialer,
        reopen: Callable[[Settings], Listener],
        recorder: Recorder | None = None,
    ) -> None:
        self.settings = settings
        self.failure: OSError | None = None  #: why the forward's only connection failed
        self._pump = pump
        self._byte_reports = byte_reports
        self._dialer = dialer
        self._recorder = recorder
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._shares = Shares(settings.max_connections)
        self._finished = asyncio.Event()
        self._acceptor: AsyncioAcceptor | None = None
        if listener is None:
            self._start(self._serve_origin())
        else:
            self._acceptor = AsyncioAcceptor(
                settings.source,
                listener,
                self._admit,
                has_room=lambda: self.connections < self.settings.max_connections,
                reopen=lambda: reopen(self.settings),
                log=log,
            )

    @property
    def listener(self) -> Listener | None:
        """The open listener; None once the forward does not listen."""
        return self._acceptor.listener if self._acceptor is not None else None

    @property
    def connections(self) -> int:
        """The number of connections, including those not joined to their target yet."""
        return len(self._tasks)

    async def finished(self) -> None:
        """Wait until the listener is closed and the last connection has ended."""
        await self._finished.wait()

    def stop_listening(self) -> None:
        """Close the listener; established connections stay."""
        if self._acceptor is not None:
            self._acceptor.close()
        if not self._tasks:
            self._finished.set()

    retire = stop_listening  #: another process has the listener

    def close(self) -> None:
        """Close the listener and all connections."""
        self.stop_listening()
        for task in self._tasks:
            task.cancel()

    def _admit(self, sock: stdlib.socket) -> None:
        client, settings = Client(sock), self.settings
        shares = self._shares if client.peer is not None and settings.is_shared else None
        if shares is not None:
            shares.limit = settings.max_connections
            if not shares.take(client.party):
                why = "its share of the connections is in use"
                client.log.warning("%s: context %s: %s", settings, client.party, why)
                sock.close()
                return
        task = self._start(self._serve(sock, client, settings))
        if shares is not None:
            task.add_done_callback(lambda _: shares.give_back(client.party))
        if settings.once:
            self.stop_listening()

    def _start(self, serving: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(serving)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: internal error: a connection was dropped", self.settings, exc_info=error)
        if self.listener is not None and self._acceptor is not None:
            self._acceptor.recheck_room()
        elif not self._tasks:
            self._finished.set()

    # Serving

    async def _serve_origin(self) -> None:
        """Open the source, which is a single stream, and serve it."""
        settings = self.settings
        try:
            sock = await self._dialer.connect(settings.source, timeout=settings.connect_timeout)
        except OSError as error:
            self.failure = error
            return
        client = Client(sock)
        client.who = ""
        await self._serve(sock, client, settings)

    async def _serve(self, sock: stdlib.socket, client: Client, settings: Settings) -> None:
        """Connect a client to its target, and wait for the end of the connection."""
        target: stdlib.socket | None = None
        who = client.who
        try:
            if client.peer is not None and not admits_peer(settings.allow, client.peer):
                client.log.warning("%s: %s is not allowed", settings, who)
                return
            early = b""
            if isinstance(settings.target, Proxy):
                target, early = await self._serve_proxy(sock, client, settings)
            else:
                target = await self._dialer.connect(
                    settings.target,
                    timeout=settings.connect_timeout,
                    wait=settings.wait,
                    client=client.peer,
                    party=client.party,
                )
            if target is None:
                return
            began = time.monotonic()
            client.log.info("%s: %s connected", settings, who)
            capture = self._recorder.stream(sock, target) if self._recorder else None
            connection = self._pump.join(
                sock, target, early=early, idle=settings.idle, capture=capture
            )
            self._byte_reports.add(connection, sock, target)
            try:
                why = await connection.ended
            finally:
                self._byte_reports.remove(connection)
                connection.close()
            sent, received = connection.moved
            client.log.info(
                "%s: %s ended%s: %d bytes sent, %d received, %.3f s",
                *(settings, who, f" ({why.strerror})" if why else "", sent, received),
                time.monotonic() - began,
            )
        except OSError as error:
            if settings.once:
                self.failure = error
            else:
                client.log.warning("%s: %s: %s", settings, who, error.strerror or error)
        finally:
            sock.close()
            if target is not None:
                target.close()

    async def _serve_proxy(
        self, sock: stdlib.socket, client: Client, settings: Settings
    ) -> tuple[stdlib.socket | None, bytes]:
        """Receive the client's request and connect its target.

        Returns the connected target (None if the request was refused), and the bytes for the target
        that the client has sent together with the request.
        """
        request = _proxy_protocol(settings.target)
        who = client.who
        try:
            async with asyncio.timeout(FORWARD_PROXY_TIMEOUT_SECONDS):
                host, port = await self._receive_request(sock, request)
        except BadRequest as error:
            client.log.warning("%s: %s: %s", settings, who, error)
            await self._send_refusal(sock, error.answer)
            return None, b""
        except TimeoutError:
            client.log.warning("%s: %s sent no request in time", settings, who)
            return None, b""
        rules = HostRules(settings.hosts)
        target: stdlib.socket | None = None
        refusal: ProxyRefusal | None = None
        try:
            if not (_is_address(host) or rules.admits_name(host, port)):
                raise NotAdmitted(errno.EACCES, f"{host}:{port} is not on the allow list")
            name = "" if _is_address(host) else host
            target = await self._dialer.connect(
                Inet(host, port),
                timeout=settings.connect_timeout,
                wait=settings.wait,
                admits=lambda address: rules.admits_address(name, address, port),
                party=client.party,
            )
        except OSError as error:
            refusal = _refusal(error)
            why = error.strerror or error
            client.log.warning("%s: %s to %s:%d: %s", settings, who, host, port, why)
        if refusal is not None or target is None:
            await self._send_refusal(sock, request.refused(refusal or ProxyRefusal.UNREACHABLE))
            return None, b""
        try:
            client.log.info("%s: %s connected to %s:%d", settings, who, host, port)
            await self._loop.sock_sendall(sock, request.granted())
        except BaseException:
            target.close()
            raise
        return target, request.rest

    async def _receive_request(
        self, client: stdlib.socket, request: ProxyProtocol
    ) -> tuple[str, int]:
        while request.target is None:
            answer = request.receive(await self._loop.sock_recv(client, 4096))
            if answer:
                await self._loop.sock_sendall(client, answer)
        return request.target

    async def _send_refusal(self, client: stdlib.socket, answer: bytes) -> None:
        """Send ``answer``, a refusal, and read until the client closes.

        Closing the socket with unread bytes would discard the answer.
        """
        with contextlib.suppress(OSError):
            async with asyncio.timeout(FORWARD_PROXY_TIMEOUT_SECONDS):
                await self._loop.sock_sendall(client, answer)
                client.shutdown(stdlib.SHUT_WR)
                while await self._loop.sock_recv(client, 65_536):
                    pass


def _proxy_protocol(target: object) -> ProxyProtocol:
    assert isinstance(target, Proxy)
    if target.protocol == "socks5":
        return Socks5()
    from .http_connect import HttpConnect  # here, because it needs h11, which slows the start

    return HttpConnect()


def _is_address(host: str) -> bool:
    for family in (stdlib.AF_INET, stdlib.AF_INET6):
        with contextlib.suppress(OSError):
            stdlib.inet_pton(family, host)
            return True
    return False


def _refusal(error: OSError) -> ProxyRefusal:
    if isinstance(error, NotAdmitted):
        return ProxyRefusal.NOT_ALLOWED
    if error.errno == errno.ECONNREFUSED:
        return ProxyRefusal.REFUSED
    if error.errno == errno.ETIMEDOUT:
        return ProxyRefusal.TIMED_OUT
    if error.errno in OUT_OF_RESOURCES:
        return ProxyRefusal.OVERLOADED
    return ProxyRefusal.UNREACHABLE
