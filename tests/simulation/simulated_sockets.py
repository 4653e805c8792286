"""Simulated stream sockets, as unix sockets behave, and an event loop with virtual time.

The ends of a pair have little room, so that they are often full.  The loop reports events in any
order, and late; it also watches descriptors of the kernel, such as eventfds.
"""

from __future__ import annotations

import errno
import heapq
import os
import select
from collections.abc import Callable, Sequence
from itertools import count
from random import Random
from select import EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP
from socket import SHUT_RD, SHUT_RDWR, SHUT_WR, SOCK_STREAM
from types import SimpleNamespace

from vsockets.devices.loop import READABLE, Timer

#: Bytes in one direction that have not been read.
ROOM = 3000
#: Descriptors of simulated sockets begin here.
FIRST = 1 << 20

_RECEIVE, _SEND = 1, 2
_SHUT = {SHUT_RD: _RECEIVE, SHUT_WR: _SEND, SHUT_RDWR: _RECEIVE | _SEND}


def pattern(start: int, length: int) -> bytes:
    """Return bytes of a stream, by their position."""
    return bytes((at * 7 + at // 251) & 255 for at in range(start, start + length))


class SimulatedSockets:
    """All simulated sockets, by descriptor."""

    def __init__(self) -> None:
        self.by_fd: dict[int, SimulatedSocket] = {}
        self._numbers = count(FIRST)

    def pair(self) -> tuple[SimulatedSocket, SimulatedSocket]:
        """Return two connected sockets."""
        one, other = SimulatedSocket(self), SimulatedSocket(self)
        one.peer, other.peer = other, one
        return one, other

    def add(self, sock: SimulatedSocket) -> int:
        """Return the descriptor of a new socket."""
        fd = next(self._numbers)
        self.by_fd[fd] = sock
        return fd

    def select(self) -> SimpleNamespace:
        """Return a substitute for the module ``select``, with poll() of simulated sockets."""
        names = {name: value for name, value in vars(select).items() if name.startswith("EPOLL")}
        names |= {name: value for name, value in vars(select).items() if name.startswith("POLL")}
        return SimpleNamespace(**names, poll=SimulatedPoll)


class SimulatedSocket:
    """One end of a connected pair."""

    type = SOCK_STREAM
    peer: SimulatedSocket

    def __init__(self, sockets: SimulatedSockets) -> None:
        self._sockets = sockets
        self._fd = sockets.add(self)
        self.inbox = bytearray()
        self.shut = 0  # directions, as the kernel has them in sk_shutdown
        self.error = 0
        self.has_changed = True  # since the last edge-triggered event

    def fileno(self) -> int:
        return self._fd

    def room(self) -> int:
        """Return the number of bytes that can be sent now."""
        return ROOM - len(self.peer.inbox)

    def events(self) -> int:
        """Return what epoll(7) reports."""
        found = 0
        if self.inbox or self.shut & _RECEIVE:
            found |= EPOLLIN
        if self.shut & _RECEIVE:
            found |= EPOLLRDHUP
        if self.room() > ROOM // 2 or self.shut & _SEND:
            found |= EPOLLOUT
        if self.shut == _RECEIVE | _SEND:
            found |= EPOLLHUP
        if self.error:
            found |= EPOLLERR
        return found

    def send(self, data: bytes, flags: int = 0) -> int:
        return self.sendmsg([memoryview(data)])

    def sendmsg(self, parts: Sequence[memoryview], ancillary: object = (), flags: int = 0) -> int:
        if self.shut & _SEND:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        data = b"".join(parts)[: self.room()]
        if not data:
            raise BlockingIOError
        self.peer.inbox += data
        self.peer.has_changed = True
        return len(data)

    def recv(self, length: int, flags: int = 0) -> bytes:
        data = bytearray(length)
        return bytes(data[: self.recvmsg_into([memoryview(data)])[0]])

    def recvmsg_into(
        self, views: Sequence[memoryview], space: int = 0, flags: int = 0
    ) -> tuple[int]:
        if not self.inbox:
            if self.error:
                error, self.error = self.error, 0
                raise ConnectionResetError(error, os.strerror(error))
            if self.shut & _RECEIVE:
                return (0,)
            raise BlockingIOError
        moved = 0
        for view in views:
            part = self.inbox[: len(view)]
            view[: len(part)] = part
            del self.inbox[: len(part)]
            moved += len(part)
        self.peer.has_changed = True
        return (moved,)

    def shutdown(self, how: int) -> None:
        mask = _SHUT[how]
        self.shut |= mask
        self.peer.shut |= mask >> 1 | (mask & _RECEIVE) << 1
        self.has_changed = self.peer.has_changed = True

    def close(self) -> None:
        if self._fd < 0:
            return
        if self.inbox:
            self.peer.error = errno.ECONNRESET
        self.shutdown(SHUT_RDWR)
        self.inbox.clear()
        del self._sockets.by_fd[self._fd]
        self._fd = -1

    def setsockopt(self, *_: int) -> None:
        """Sizes are fixed."""

    def setblocking(self, _: bool) -> None:
        """Do nothing: no call blocks."""


class SimulatedPoll:
    """poll(2) of one simulated socket, which returns at once."""

    def __init__(self) -> None:
        self._sock: SimulatedSocket | None = None
        self._events = 0

    def register(self, sock: SimulatedSocket, events: int) -> None:
        self._sock, self._events = sock, events | EPOLLHUP | EPOLLERR

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        assert self._sock is not None
        events = self._sock.events() & self._events
        return [(self._sock.fileno(), events)] if events else []


class SimulatedLoop:
    """A device's loop whose time and order of events are decided by the world."""

    def __init__(self, sockets: SimulatedSockets) -> None:
        self.now = 1000.0
        self._sockets = sockets
        self._watched: dict[int, tuple[int, Callable[[int], None]]] = {}
        self._epoll = select.epoll()  # of the kernel's descriptors
        self._reported: dict[int, int] = {}  # by the kernel, and not yet served
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = count()
        self._spinning: dict[Callable[[], bool], float] = {}

    def close(self) -> None:
        self._epoll.close()

    def forget(self) -> None:
        """Forget all timers and descriptors: their process has been killed."""
        for fd in list(self._watched):
            self.unwatch(fd)
        self._timers.clear()
        self._spinning.clear()

    def time(self) -> float:
        return self.now

    def watch(self, fd: int, callback: Callable[[int], None]) -> None:
        self.watch_for(fd, callback, READABLE)

    def watch_for(self, fd: int, callback: Callable[[int], None], events: int) -> None:
        assert fd not in self._watched, "watched twice"
        self._watched[fd] = events, callback
        if fd < FIRST:
            self._epoll.register(fd, events)
        else:
            self._sockets.by_fd[fd].has_changed = True

    def watch_first(self, fd: int, callback: Callable[[int], None]) -> None:
        self.watch_for(fd, callback, READABLE)

    def change(self, fd: int, events: int) -> None:
        self._watched[fd] = events, self._watched[fd][1]
        if fd < FIRST:
            self._epoll.modify(fd, events)
        else:
            self._sockets.by_fd[fd].has_changed = True

    def unwatch(self, fd: int) -> None:
        if self._watched.pop(fd, None) is not None and fd < FIRST:
            self._epoll.unregister(fd)
            self._reported.pop(fd, None)

    def watches(self, fd: int) -> bool:
        return fd in self._watched

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(callback)
        heapq.heappush(self._timers, (self.now + seconds, next(self._numbers), timer))
        return timer

    def spin(self, poll_once: Callable[[], bool], seconds: float) -> None:
        self._spinning[poll_once] = self.now + seconds

    def ready(self) -> list[tuple[int, int]]:
        """Return the descriptors with events, and the events."""
        for fd, events in self._epoll.poll(0):
            self._reported[fd] = self._reported.get(fd, 0) | events
        found = list(self._reported.items())
        for fd, (wanted, _) in self._watched.items():
            if fd >= FIRST:
                sock = self._sockets.by_fd[fd]
                events = sock.events() & (wanted | EPOLLHUP | EPOLLERR)
                if events and (sock.has_changed or not wanted & EPOLLET):
                    found.append((fd, events))
        return found

    def turn(self, chance: Random) -> bool:
        """Serve one event, if there is one; return whether."""
        for poll_once, until in list(self._spinning.items()):
            if poll_once() or self.now > until:
                self._spinning.pop(poll_once, None)
        ready = self.ready()
        if not ready:
            return False
        fd, events = chance.choice(ready)
        self._reported.pop(fd, None)
        if fd >= FIRST:
            self._sockets.by_fd[fd].has_changed = False
        self._watched[fd][1](events)
        return True

    def advance(self, seconds: float) -> None:
        """Let time pass, and run the timers that are due."""
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            self.now, _, timer = heapq.heappop(self._timers)
            if timer.callback is not None:
                timer.callback()
        self.now = end
