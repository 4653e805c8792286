"""One forward of streams: accept, decide, connect, and hand both over to the pump."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket as stdlib
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from ...limits import FORWARD_ACCEPTS, FORWARD_LONGEST_PAUSE, FORWARD_PROXY_SECONDS
from ...locator import Exec, Inet, Proxy, Stdio
from .dialer import Dialer, NotAdmitted
from .front_end import BadRequest, FrontEnd, Refusal
from .reports import Complaints, describe_peer, log, peer_of
from .rules import HostRules, admits_peer
from .settings import Settings
from .socks5 import Socks5

if TYPE_CHECKING:
    from ..capture.recorder import Recorder
    from ..doors import Door
    from .pump import Pump

#: How long to leave a listener alone that cannot be accepted from, in seconds.
_ACCEPT_AGAIN = 0.1


class StreamForward:
    """Serves one forward in the running asyncio loop.

    ``settings`` may be replaced at any time; the connections that stand keep what they had.
    ``door`` is None when the source is no place to come to; ``reopen`` makes it anew when
    vsockd, which it was a door of, has ended.
    """

    def __init__(
        self,
        settings: Settings,
        door: Door | None,
        pump: Pump,
        dialer: Dialer,
        reopen: Callable[[Settings], Door | None],
        recorder: Recorder | None = None,
    ) -> None:
        self.settings = settings
        self.door = door
        self._reopen = reopen
        self.failure: OSError | None = None  #: why the only connection did not come about
        self._pump = pump
        self._dialer = dialer
        self._recorder = recorder
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listening = False
        self._complaints = Complaints()
        self._finished = asyncio.Event()
        if door is None:
            self._start(self._serve_origin())
        else:
            self._listen(True)

    @property
    def connections(self) -> int:
        """How many there are, those included that are not joined yet."""
        return len(self._tasks)

    async def finished(self) -> None:
        """Return when the door is closed and the last connection has ended."""
        await self._finished.wait()

    def close_door(self) -> None:
        """Let nobody in any more; the connections that stand go on."""
        self._listen(False)
        if self.door is not None:
            self.door.close()
            self.door = None
        if not self._tasks:
            self._finished.set()

    def close(self) -> None:
        """End everything."""
        self.close_door()
        for task in self._tasks:
            task.cancel()

    # Letting in

    def _listen(self, wanted: bool) -> None:
        if self.door is None or wanted == self._listening:
            return
        self._listening = wanted
        for sock in self.door.sockets:
            if wanted:
                self._loop.add_reader(sock.fileno(), self._accept, sock)
            else:
                self._loop.remove_reader(sock.fileno())

    def _accept(self, listener: stdlib.socket) -> None:
        for _ in range(FORWARD_ACCEPTS):
            if self.connections >= self.settings.max_connections:
                self._listen(False)  # the backlog makes clients wait
                return
            try:
                client, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.ECONNABORTED, errno.ECONNRESET):
                    continue  # that client has gone already
                log.warning("%s: cannot accept: %s", self.settings.source, error.strerror)
                self._listen(False)
                again = self._open_again if error.errno == errno.ENETDOWN else self._accept_again
                self._loop.call_later(_ACCEPT_AGAIN, again)
                return
            client.setblocking(False)
            self._start(self._serve(client, self.settings))
            if self.settings.once:
                self.close_door()
                return

    def _accept_again(self) -> None:
        self._listen(True)

    def _open_again(self) -> None:
        """The door is one of a vsockd that has ended; there may be another by now."""
        if self.door is None:
            return
        self.door.close()
        try:
            self.door = self._reopen(self.settings)
        except OSError:
            self._loop.call_later(FORWARD_LONGEST_PAUSE, self._open_again)
        else:
            log.warning("%s: listening again", self.settings.source)
            self._listening = False  # whatever was done with the old one
            self._listen(True)

    def _start(self, serving: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(serving)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: a connection was lost", self.settings, exc_info=error)
        if self.door is None:
            if not self._tasks:
                self._finished.set()
        elif self.connections < self.settings.max_connections:
            self._listen(True)

    # Serving

    async def _serve_origin(self) -> None:
        """The source is no door but a stream of its own."""
        settings = self.settings
        try:
            client = await self._dialer.connect(settings.source, timeout=settings.connect_timeout)
        except OSError as error:
            self.failure = error
            return
        await self._serve(client, settings)

    async def _serve(self, client: stdlib.socket, settings: Settings) -> None:
        """Take one client to its target, and see it through."""
        target: stdlib.socket | None = None
        who = "" if isinstance(settings.source, Stdio | Exec) else describe_peer(client)
        try:
            peer = peer_of(client)
            if peer is not None and not admits_peer(settings.allow, peer):
                self._complaints.say("%s: %s is not allowed", settings, who)
                return
            said = b""
            if isinstance(settings.target, Proxy):
                target, said = await self._serve_proxy(client, settings, who)
            else:
                target = await self._dialer.connect(
                    settings.target,
                    timeout=settings.connect_timeout,
                    wait=settings.wait,
                    client=peer,
                )
            if target is None:
                return
            began = time.monotonic()
            log.info("%s: %s connected", settings, who)
            tap = self._recorder.stream(client, target) if self._recorder else None
            connection = self._pump.join(client, target, said=said, idle=settings.idle, tap=tap)
            try:
                why = await connection.ended
            finally:
                connection.close()
            there, back = connection.moved
            log.info(
                "%s: %s ended%s: %d bytes there, %d back, %.3f s",
                *(settings, who, f" ({why.strerror})" if why else "", there, back),
                time.monotonic() - began,
            )
        except OSError as error:
            if settings.once:
                self.failure = error
            else:
                self._complaints.say("%s: %s: %s", settings, who, error.strerror or error)
        finally:
            client.close()
            if target is not None:
                target.close()

    async def _serve_proxy(
        self, client: stdlib.socket, settings: Settings, who: str
    ) -> tuple[stdlib.socket | None, bytes]:
        """The target the client asked for, and what it has said to it; None when refused."""
        front = _front_end(settings.target)
        try:
            async with asyncio.timeout(FORWARD_PROXY_SECONDS):
                host, port = await self._ask(client, front)
        except BadRequest as error:
            self._complaints.say("%s: %s: %s", settings, who, error)
            await self._tell(client, error.answer)
            return None, b""
        except TimeoutError:
            self._complaints.say("%s: %s sent no request in time", settings, who)
            return None, b""
        rules = HostRules(settings.hosts)
        target: stdlib.socket | None = None
        refusal: Refusal | None = None
        try:
            if not (_is_address(host) or rules.admits_name(host, port)):
                raise NotAdmitted(errno.EACCES, f"{host}:{port} is not on the allow list")
            name = "" if _is_address(host) else host
            target = await self._dialer.connect(
                Inet(host, port),
                timeout=settings.connect_timeout,
                wait=settings.wait,
                admits=lambda address: rules.admits_address(name, address, port),
            )
        except OSError as error:
            refusal = _refusal(error)
            self._complaints.say(
                "%s: %s to %s:%d: %s", settings, who, host, port, error.strerror or error
            )
        if refusal is not None or target is None:
            await self._tell(client, front.refused(refusal or Refusal.UNREACHABLE))
            return None, b""
        try:
            log.info("%s: %s goes to %s:%d", settings, who, host, port)
            await self._loop.sock_sendall(client, front.granted())
        except BaseException:
            target.close()
            raise
        return target, front.rest

    async def _ask(self, client: stdlib.socket, front: FrontEnd) -> tuple[str, int]:
        while front.target is None:
            answer = front.receive(await self._loop.sock_recv(client, 4096))
            if answer:
                await self._loop.sock_sendall(client, answer)
        return front.target

    async def _tell(self, client: stdlib.socket, answer: bytes) -> None:
        """Send a refusal so that it arrives: closing with bytes unread would throw it away."""
        with contextlib.suppress(OSError):
            async with asyncio.timeout(FORWARD_PROXY_SECONDS):
                await self._loop.sock_sendall(client, answer)
                client.shutdown(stdlib.SHUT_WR)
                while await self._loop.sock_recv(client, 65_536):
                    pass


def _front_end(target: object) -> FrontEnd:
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


def _refusal(error: OSError) -> Refusal:
    if isinstance(error, NotAdmitted):
        return Refusal.NOT_ALLOWED
    if error.errno == errno.ECONNREFUSED:
        return Refusal.REFUSED
    if error.errno == errno.ETIMEDOUT:
        return Refusal.TIMED_OUT
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
        return Refusal.OVERLOADED
    return Refusal.UNREACHABLE
