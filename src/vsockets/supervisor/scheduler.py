"""The scheduler of coroutines that wait for descriptors or time.

A handler awaits :func:`ready`, :func:`lent` or :func:`pause`; the thread serves other calls
meanwhile.
"""

from __future__ import annotations

import ctypes
import heapq
import os
import select
import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from itertools import count

from .._linux.libc import EpollEvent, last_error, libc

READABLE, WRITABLE = select.EPOLLIN | select.EPOLLRDHUP, select.EPOLLOUT
HUNG_UP = select.EPOLLRDHUP

_ADD, _REMOVE, _CHANGE = 1, 2, 3
_ONCE = select.EPOLLONESHOT
#: Keys take the place of descriptors in the standard library's epoll: positive 32-bit integers.
_LARGEST_KEY = 0x7FFF_FFFF
#: Sockets whose registration is remembered; more of them cost a system call.
_KEPT = 1024
#: The longest timeout of poll(2), an ``int`` of milliseconds.
_LONGEST_POLL = 0x7FFF_FFFF


class Wait:
    """An event or time to wait for; awaiting it returns whether the event came in time."""

    __slots__ = ("defers_signals", "events", "fd", "seconds", "socket")

    def __init__(
        self,
        fd: int | None,
        events: int,
        seconds: float | None,
        socket: int | None,
        defers_signals: bool = False,
    ) -> None:
        self.fd = fd
        self.events = events
        self.seconds = seconds
        self.socket = socket
        #: Whether signals do not interrupt the call on Linux, where it does not wait.
        self.defers_signals = defers_signals

    def __await__(self) -> Generator[Wait, bool, bool]:
        return (yield self)


def ready(
    fd: int, seconds: float | None, events: int = READABLE, defers_signals: bool = False
) -> Wait:
    """Return a wait for ``fd``, which must stay open meanwhile."""
    return Wait(fd, events, seconds, None, defers_signals)


def lent(fd: int, inode: int, seconds: float | None) -> Wait:
    """Return a wait until a socket is readable; ``fd`` is a copy of it, and ``inode`` its inode.

    The scheduler owns the copy, and closes it when the wait begins: if the program then closes its
    own descriptor, the socket is closed.
    """
    return Wait(fd, READABLE, seconds, inode)


def pause(seconds: float) -> Wait:
    """Return a wait for ``seconds`` to pass."""
    return Wait(None, 0, seconds, None, True)


Resume = Callable[[bool], None]


class _Group:
    """The waits for one socket, which have one registration in the epoll."""

    __slots__ = ("fd", "is_armed", "key", "waits")

    def __init__(self, key: int) -> None:
        self.key = key  #: of the registration
        self.fd = -1  #: the number of the copy of the socket that was registered last
        self.is_armed = False  #: whether the epoll reports the socket's next event
        self.waits: dict[int, Resume] = {}  #: by their keys, the oldest first


class CoroutineScheduler:
    """One epoll, and the coroutines and callbacks that wait for its events."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._direct: dict[int, Callable[[int], None]] = {}
        self._epoll = select.epoll()
        self._poll.register(self._epoll.fileno(), select.POLLIN)
        # The standard library's epoll reports descriptors, which are closed and reused here; keys
        # are not.
        self._control = libc.epoll_ctl
        self._event = EpollEvent()
        self._event_at = ctypes.byref(self._event)
        self._watched: dict[int, Callable[[int], None]] = {}
        self._waiting: dict[int, tuple[int | None, Resume]] = {}
        self._groups: dict[int, _Group] = {}  # by their keys
        self._group_for: OrderedDict[int, _Group] = OrderedDict()  # by a socket's inode
        self._group_of: dict[int, _Group] = {}  # by the key of a wait
        self._timers: list[tuple[float, int]] = []
        self._next = count(1)

    def watch_directly(self, fd: int, callback: Callable[[int], None]) -> None:
        """Call ``callback(events)`` whenever ``fd``, one of the busiest, is readable or hung up.

        The descriptor is polled beside the epoll: through an epoll, the thread that makes a
        notified system call would not hand over its processor (SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP),
        which saves most of the time.
        """
        self._direct[fd] = callback
        self._poll.register(fd, select.POLLIN)

    def unwatch_directly(self, fd: int) -> None:
        """Stop watching ``fd``, which is still open."""
        del self._direct[fd]
        self._poll.unregister(fd)

    def watch(self, fd: int, callback: Callable[[int], None], events: int = select.EPOLLIN) -> int:
        """Call ``callback(events)`` whenever ``fd`` is readable or hung up.

        Returns a key for :meth:`unwatch`.

        Raises OSError if ``fd`` cannot be polled.
        """
        key = self._key()
        self._watched[key] = callback
        self._set(_ADD, fd, events, key)
        return key

    def unwatch(self, key: int, fd: int) -> None:
        """Stop watching ``fd``, which is still open."""
        del self._watched[key]
        self._set(_REMOVE, fd, 0, 0)

    def add(self, wait: Wait, resume: Resume) -> int:
        """Call ``resume`` once, with True if the event of ``wait`` came in time, else with False.

        Returns a key for :meth:`cancel`.

        Raises OSError if the descriptor cannot be polled.
        """
        key = next(self._next) & _LARGEST_KEY
        if wait.fd is None:
            self._waiting[key] = None, resume
        elif wait.socket is None:
            self._waiting[key] = wait.fd, resume
            self._set(_ADD, wait.fd, wait.events | _ONCE, key)
        else:
            group = self._group_for.get(wait.socket) or self._new_group(wait.socket)
            try:
                self._register_copy(wait.fd, wait.events | _ONCE, group)
            finally:
                os.close(wait.fd)
            group.waits[key] = resume
            self._group_of[key] = group
        if wait.seconds is not None:
            heapq.heappush(self._timers, (time.monotonic() + wait.seconds, key))
        return key

    def _new_group(self, inode: int) -> _Group:
        key = self._key()
        group = self._groups[key] = self._group_for[inode] = _Group(key)
        if len(self._group_for) > _KEPT:
            oldest, dropped = self._group_for.popitem(last=False)
            if dropped.waits:
                self._group_for[oldest] = dropped
            else:
                del self._groups[dropped.key]
        return group

    def _register_copy(self, fd: int, events: int, group: _Group) -> None:
        """Register a copy of a socket, or change the registration of an earlier copy.

        A registration outlives its copy as long as the socket, and is found again by a copy with
        the same number, which most copies of a listener have.
        """
        expected = group.fd == fd
        try:
            self._set(_CHANGE if expected else _ADD, fd, events, group.key)
        except (FileExistsError, FileNotFoundError):
            self._set(_ADD if expected else _CHANGE, fd, events, group.key)
        group.fd, group.is_armed = fd, True

    def cancel(self, key: int) -> None:
        """Drop a wait, unless it has ended already."""
        self._take(key)

    def poll(self) -> None:
        """Wait for the next events, and run the callbacks and coroutines that wait for them."""
        for fd, events in self._poll.poll(self._until_next_timer() if self._timers else None):
            callback = self._direct.get(fd)
            if callback is not None:
                callback(events)
            elif fd == self._epoll.fileno():
                self._poll_others()
        if not self._timers:
            return
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            late = self._take(heapq.heappop(self._timers)[1])
            if late is not None:
                late(False)

    def _poll_others(self) -> None:
        for key, events in self._epoll.poll(0):
            if (callback := self._watched.get(key)) is not None:
                callback(events)
            elif (group := self._groups.get(key)) is not None:
                self._resume_group(group)
            elif (taken := self._take(key)) is not None:
                taken(True)

    def _resume_group(self, group: _Group) -> None:
        """Resume the waits for a socket one after the other, until one waits for it again.

        The event may be a single connection or message, which the first one takes.
        """
        group.is_armed = False
        for key in list(group.waits):
            if group.is_armed:
                return
            if (taken := self._take(key)) is not None:
                taken(True)

    def _until_next_timer(self) -> float | None:
        """Return the milliseconds until the next timer expires, or None without one."""
        while self._timers and not self._is_waiting(self._timers[0][1]):
            heapq.heappop(self._timers)
        if not self._timers:
            return None
        return min(max(0.0, self._timers[0][0] - time.monotonic()) * 1000, _LONGEST_POLL)

    def _is_waiting(self, key: int) -> bool:
        return key in self._waiting or key in self._group_of

    def _take(self, key: int) -> Resume | None:
        if key in self._waiting:
            fd, resume = self._waiting.pop(key)
            if fd is not None:
                self._set(_REMOVE, fd, 0, 0)
            return resume
        group = self._group_of.pop(key, None)
        # The registration that its group leaves in the epoll is removed with the socket.
        return None if group is None else group.waits.pop(key)

    def _key(self) -> int:
        return next(self._next) & _LARGEST_KEY

    def _set(self, operation: int, fd: int, events: int, key: int) -> None:
        self._event.events, self._event.data = events & 0xFFFF_FFFF, key
        if self._control(self._epoll.fileno(), operation, fd, self._event_at) != 0:
            raise last_error()
