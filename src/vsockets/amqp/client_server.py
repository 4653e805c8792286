"""A proxy's clients: let in at a door, a session each, and seen off with a connection.close."""

from __future__ import annotations

import asyncio
import contextlib
import socket as stdlib
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

from ..attachment import ContextHandle
from ..eventloop.asyncio_server import AsyncioAcceptor
from ..eventloop.listeners import open_listener
from ..forward.throttled_log import Client
from ..model.locator import Locator
from .limits import AMQP_SESSIONS_MAX
from .session import AmqpSession, log


class ClientServer(ABC):
    """What a guest proxy and a host proxy have in common; made in a running loop."""

    def __init__(self, listen: Locator, context: ContextHandle | None) -> None:
        """Raises OSError when nobody can be let in there."""
        self._loop = asyncio.get_running_loop()
        self._sessions: set[AmqpSession] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._entrance = AsyncioAcceptor(
            listen,
            open_listener(listen, context),
            self._enter,
            has_room=lambda: len(self._tasks) < AMQP_SESSIONS_MAX,
            reopen=lambda: open_listener(listen, context),
            log=log,
        )

    @abstractmethod
    def session_of(self, client: Client) -> AbstractContextManager[AmqpSession]:
        """The session of a client that has come.  Raises OSError when it is not let in."""

    @abstractmethod
    async def reach(self, session: AmqpSession) -> None:
        """Give a session its far side.  Raises OSError."""

    @property
    def where(self) -> str:
        """Where clients come to."""
        assert self._entrance.door is not None
        return self._entrance.door.where

    async def drain(self) -> None:
        """Let nobody in any more, and see off those who are there."""
        self._entrance.close()
        for session in list(self._sessions):
            session.interrupt("the proxy is shut down")
        if self._tasks:
            await asyncio.wait(list(self._tasks))

    def close(self) -> None:
        """End everything now."""
        self._entrance.close()
        for task in self._tasks:
            task.cancel()

    def _enter(self, sock: stdlib.socket) -> None:
        task = self._loop.create_task(self._serve(sock, Client(sock, log)))
        self._tasks.add(task)
        task.add_done_callback(self._left)

    def _left(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a session was lost", exc_info=error)
        self._entrance.look_again()

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
