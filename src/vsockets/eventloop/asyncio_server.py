"""Listening at a door, in an asyncio loop: to clients of streams, and to datagrams."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket as stdlib
from collections.abc import Callable

from .._linux.descriptor_passing import guard_accepted
from ..attachment import ContextHandle
from ..limits import ACCEPTS_PER_TURN_MAX, RETRY_LONGEST_PAUSE_SECONDS
from ..model.locator import Locator, Vsock
from .listeners import Listener
from .rebind import FIRST_LOOK, Revival

#: How long to leave a listener alone that cannot be accepted from, in seconds.
_ACCEPT_AGAIN = FIRST_LOOK


class AsyncioAcceptor:
    """Gives every client's socket to ``enter``, as long as ``has_room``; else the backlog waits.

    ``reopen`` makes the door again when vsockd, which it was a door of, has ended.
    """

    def __init__(
        self,
        where: Locator,
        door: Listener,
        enter: Callable[[stdlib.socket], None],
        *,
        has_room: Callable[[], bool],
        reopen: Callable[[], Listener],
        log: logging.Logger,
    ) -> None:
        self.door: Listener | None = door
        self._where = where
        self._enter = enter
        self._has_room = has_room
        self._reopen = reopen
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._listening = False
        self._listen(True)

    def close(self) -> None:
        """Let nobody in any more."""
        self._listen(False)
        if self.door is not None:
            self.door.close()
            self.door = None

    def look_again(self) -> None:
        """Somebody has left: there may be room."""
        if self._has_room():
            self._listen(True)

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
        for _ in range(ACCEPTS_PER_TURN_MAX):
            if self.door is None:
                return  # the last client was the last
            if not self._has_room():
                self._listen(False)  # the backlog makes clients wait
                return
            try:
                client, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.ECONNABORTED, errno.ECONNRESET):
                    continue  # that client has gone already
                self._log.warning("%s: cannot accept: %s", self._where, error.strerror)
                self._listen(False)
                again = self._open_again if error.errno == errno.ENETDOWN else self._accept_again
                self._loop.call_later(_ACCEPT_AGAIN, again)
                return
            client.setblocking(False)
            self._enter(guard_accepted(client))

    def _accept_again(self) -> None:
        self._listen(True)

    def _open_again(self) -> None:
        """The door is one of a vsockd that has ended; there may be another by now."""
        if self.door is None:
            return
        self.door.close()
        try:
            self.door = self._reopen()
        except OSError:
            self._loop.call_later(RETRY_LONGEST_PAUSE_SECONDS, self._open_again)
        else:
            self._log.warning("%s: listening again", self._where)
            self._listening = False  # whatever was done with the old one
            self._listen(True)


class DatagramEntrance:
    """Calls ``receive`` with each socket of a door that is readable.

    ``reopen`` makes the door again when vsockd has ended that the door, or the target that
    datagrams go to, belonged to; ``lost`` is called before that.
    """

    def __init__(
        self,
        where: Locator,
        door: Listener,
        receive: Callable[[stdlib.socket], None],
        *,
        reopen: Callable[[], Listener],
        context: ContextHandle | None,
        log: logging.Logger,
        target: Locator | None = None,
        lost: Callable[[], None] = lambda: None,
    ) -> None:
        """Raises OSError."""
        self.door = door
        self._where = where
        self._receive = receive
        self._reopen = reopen
        self._lost = lost
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._revival: Revival | None = None
        if isinstance(where, Vsock) or isinstance(target, Vsock):
            self._revival = Revival(context, self._ended, self._open_again)
        self._listen()

    def close(self) -> None:
        """Receive no more."""
        if self._revival is not None:
            self._revival.close()
        self._close_door()

    def _listen(self) -> None:
        for sock in self.door.sockets:
            self._loop.add_reader(sock.fileno(), self._receive, sock)

    def _close_door(self) -> None:
        for sock in self.door.sockets:
            self._loop.remove_reader(sock.fileno())
        self.door.close()

    def _ended(self) -> None:
        self._log.warning("%s: vsockd has ended", self._where)
        self._lost()
        if isinstance(self._where, Vsock):
            self._close_door()

    def _open_again(self) -> None:
        if isinstance(self._where, Vsock):
            self.door = self._reopen()
            self._listen()
        self._log.warning("%s: listening again", self._where)
