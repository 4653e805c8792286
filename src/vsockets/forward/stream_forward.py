"""One forward of streams: accept, decide, connect, and hand both over to the pump."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket as stdlib
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from ..eventloop.asyncio_server import AsyncioAcceptor
from ..model.locator import Inet, Proxy
from .dialer import Dialer, NotAdmitted
from .limits import FORWARD_PROXY_TIMEOUT_SECONDS
from .proxy_protocol import BadRequest, ProxyProtocol, ProxyRefusal
from .rules import HostRules, admits_peer
from .settings import Settings
from .shares import Shares
from .socks5 import Socks5
from .throttled_log import Client, log

if TYPE_CHECKING:
    from ..capture.recorder import Recorder
    from ..eventloop.listeners import Listener
    from .pump import AsyncioSplicePump


class StreamForward:
    """Serves one forward in the running asyncio loop.

    ``settings`` may be replaced at any time; the connections that stand keep what they had.
    ``door`` is None when the source is no place to come to; ``reopen`` makes it anew when
    vsockd, which it was a door of, has ended.
    """

    def __init__(
        self,
        settings: Settings,
        door: Listener | None,
        pump: AsyncioSplicePump,
        dialer: Dialer,
        reopen: Callable[[Settings], Listener],
        recorder: Recorder | None = None,
    ) -> None:
        self.settings = settings
        self.failure: OSError | None = None  #: why the only connection did not come about
        self._pump = pump
        self._dialer = dialer
        self._recorder = recorder
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._shares = Shares(settings.max_connections)
        self._finished = asyncio.Event()
        self._entrance: AsyncioAcceptor | None = None
        if door is None:
            self._start(self._serve_origin())
        else:
            self._entrance = AsyncioAcceptor(
                settings.source,
                door,
                self._enter,
                has_room=lambda: self.connections < self.settings.max_connections,
                reopen=lambda: reopen(self.settings),
                log=log,
            )

    @property
    def door(self) -> Listener | None:
        """Where clients come to; None when nobody can any more."""
        return self._entrance.door if self._entrance is not None else None

    @property
    def connections(self) -> int:
        """How many there are, those included that are not joined yet."""
        return len(self._tasks)

    async def finished(self) -> None:
        """Return when the door is closed and the last connection has ended."""
        await self._finished.wait()

    def close_door(self) -> None:
        """Let nobody in any more; the connections that stand go on."""
        if self._entrance is not None:
            self._entrance.close()
        if not self._tasks:
            self._finished.set()

    def close(self) -> None:
        """End everything."""
        self.close_door()
        for task in self._tasks:
            task.cancel()

    def _enter(self, sock: stdlib.socket) -> None:
        client, settings = Client(sock), self.settings
        shares = self._shares if client.peer is not None and settings.is_shared else None
        if shares is not None:
            shares.limit = settings.max_connections
            if not shares.take(client.party):
                why = "has its share of the connections"
                client.log.warning("%s: context %s %s", settings, client.party, why)
                sock.close()
                return
        task = self._start(self._serve(sock, client, settings))
        if shares is not None:
            task.add_done_callback(lambda _: shares.give_back(client.party))
        if settings.once:
            self.close_door()

    def _start(self, serving: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(serving)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: a connection was lost", self.settings, exc_info=error)
        if self.door is not None and self._entrance is not None:
            self._entrance.look_again()
        elif not self._tasks:
            self._finished.set()

    # Serving

    async def _serve_origin(self) -> None:
        """The source is no door but a stream of its own."""
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
        """Take one client to its target, and see it through."""
        target: stdlib.socket | None = None
        who = client.who
        try:
            if client.peer is not None and not admits_peer(settings.allow, client.peer):
                client.log.warning("%s: %s is not allowed", settings, who)
                return
            said = b""
            if isinstance(settings.target, Proxy):
                target, said = await self._serve_proxy(sock, client, settings)
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
            tap = self._recorder.stream(sock, target) if self._recorder else None
            connection = self._pump.join(sock, target, said=said, idle=settings.idle, tap=tap)
            try:
                why = await connection.ended
            finally:
                connection.close()
            there, back = connection.moved
            client.log.info(
                "%s: %s ended%s: %d bytes there, %d back, %.3f s",
                *(settings, who, f" ({why.strerror})" if why else "", there, back),
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
        """The target the client asked for, and what it has said to it; None when refused."""
        front = _front_end(settings.target)
        who = client.who
        try:
            async with asyncio.timeout(FORWARD_PROXY_TIMEOUT_SECONDS):
                host, port = await self._ask(sock, front)
        except BadRequest as error:
            client.log.warning("%s: %s: %s", settings, who, error)
            await self._tell(sock, error.answer)
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
            await self._tell(sock, front.refused(refusal or ProxyRefusal.UNREACHABLE))
            return None, b""
        try:
            client.log.info("%s: %s goes to %s:%d", settings, who, host, port)
            await self._loop.sock_sendall(sock, front.granted())
        except BaseException:
            target.close()
            raise
        return target, front.rest

    async def _ask(self, client: stdlib.socket, front: ProxyProtocol) -> tuple[str, int]:
        while front.target is None:
            answer = front.receive(await self._loop.sock_recv(client, 4096))
            if answer:
                await self._loop.sock_sendall(client, answer)
        return front.target

    async def _tell(self, client: stdlib.socket, answer: bytes) -> None:
        """Send a refusal so that it arrives: closing with bytes unread would throw it away."""
        with contextlib.suppress(OSError):
            async with asyncio.timeout(FORWARD_PROXY_TIMEOUT_SECONDS):
                await self._loop.sock_sendall(client, answer)
                client.shutdown(stdlib.SHUT_WR)
                while await self._loop.sock_recv(client, 65_536):
                    pass


def _front_end(target: object) -> ProxyProtocol:
    assert isinstance(target, Proxy)
    if target.protocol == "socks5":
        return Socks5()
    from .http_connect import HttpConnect  # here, because it needs h11

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
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
        return ProxyRefusal.OVERLOADED
    return ProxyRefusal.UNREACHABLE
