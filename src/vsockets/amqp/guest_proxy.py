"""The guest proxy, which runs in a guest and which stock AMQP clients connect to as the broker.

Each client's connection becomes one stream to the host proxy, and one session there.  The host
proxy serves its clients by the same class, :class:`ClientServer`.  This module imports the standard
library only, because a guest may have nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket as stdlib
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Iterator
from contextlib import AbstractContextManager, contextmanager

from ..attachment import ContextHandle
from ..eventloop.asyncio_server import AsyncioAcceptor, open_listener
from ..forward.client import Client
from ..forward.dialer import Dialer
from ..model.locator import Locator
from .limits import AMQP_OPEN_TIMEOUT_SECONDS, AMQP_SESSIONS_MAX
from .session import AmqpSession, log


class ClientServer(ABC):
    """A server of AMQP clients: the base class of the guest proxy and the host proxy.

    The constructor needs a running asyncio loop.
    """

    def __init__(self, listen: Locator, context: ContextHandle | None) -> None:
        """Listen on ``listen``, in ``context`` if it is a vSockets address.

        Raises OSError when the address is in use or unavailable.
        """
        self._loop = asyncio.get_running_loop()
        self._sessions: set[AmqpSession] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._acceptor = AsyncioAcceptor(
            listen,
            open_listener(listen, context),
            self._admit,
            has_room=lambda: len(self._tasks) < AMQP_SESSIONS_MAX,
            reopen=lambda: open_listener(listen, context),
            log=log,
        )

    @abstractmethod
    def session_of(self, client: Client) -> AbstractContextManager[AmqpSession]:
        """Return a context manager that yields a client's session and counts it against limits.

        Raises OSError when the client exceeds a limit.
        """

    @abstractmethod
    async def reach(self, session: AmqpSession) -> None:
        """Connect the far side of ``session``, which leads to the broker.

        Raises OSError if the connect fails.
        """

    @property
    def where(self) -> str:
        """The address that clients connect to, as text without scheme."""
        assert self._acceptor.listener is not None
        return self._acceptor.listener.where

    async def drain(self) -> None:
        """Stop accepting, and close each client's session with connection.close."""
        self._acceptor.close()
        for session in list(self._sessions):
            session.interrupt("the proxy is shutting down")
        if self._tasks:
            await asyncio.wait(list(self._tasks))

    def retire(self) -> Awaitable[object]:
        """Stop accepting: another process does.  Return an awaitable of the sessions' end."""
        self._acceptor.close()
        return asyncio.gather(*self._tasks, return_exceptions=True)

    def close(self) -> None:
        """Stop accepting and abort all sessions."""
        self._acceptor.close()
        for task in self._tasks:
            task.cancel()

    def _admit(self, sock: stdlib.socket) -> None:
        task = self._loop.create_task(self._serve(sock, Client(sock, log)))
        self._tasks.add(task)
        task.add_done_callback(self._on_session_done)

    def _on_session_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("internal error: a session was dropped", exc_info=error)
        self._acceptor.recheck_room()

    async def _serve(self, sock: stdlib.socket, client: Client) -> None:
        with contextlib.ExitStack() as stack:
            try:
                session = stack.enter_context(self.session_of(client))
            except OSError as error:
                client.log.warning("%s: %s", client.who, error.strerror or error)
                sock.close()
                return
            stack.callback(session.abort)
            self._sessions.add(session)
            stack.callback(self._sessions.discard, session)
            await session.join(sock)
            try:
                await self.reach(session)
            except OSError as error:
                session.interrupt(f"the broker cannot be reached ({error.strerror or error})")
            else:
                client.log.info("%s: connected", client.who)
            await session.done
            client.log.info("%s: ended", client.who)


class GuestProxy(ClientServer):
    """A proxy that connects each client of ``listen`` to the host proxy at ``host``."""

    def __init__(
        self, listen: Locator, host: Locator, context: ContextHandle | None = None
    ) -> None:
        super().__init__(listen, context)
        self._host = host
        self._dialer = Dialer(context)

    @contextmanager
    def session_of(self, client: Client) -> Iterator[AmqpSession]:
        """Yield a session without inspection: the host proxy inspects it."""
        yield AmqpSession(client)

    async def reach(self, session: AmqpSession) -> None:
        """Connect the far side to the host proxy."""
        sock = await self._dialer.connect(
            self._host, timeout=AMQP_OPEN_TIMEOUT_SECONDS, wait=AMQP_OPEN_TIMEOUT_SECONDS
        )
        await self._loop.create_connection(lambda: session.far, sock=sock)
