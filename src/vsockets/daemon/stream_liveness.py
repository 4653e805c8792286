"""Knowing when a stream ends without holding it open.

vsockd must not keep a descriptor of a stream it brokered: the peers would never see its end.
But an epoll registration outlives the descriptor it was made with for as long as *somebody*
has the socket open, and it holds nothing open itself.  So each brokered stream is registered
here, in an epoll that is asked only now and then:

- the connecting side closed: the kernel reports EPOLLHUP for the accepting side's socket;
- the accepting side closed: the registration is gone from ``/proc/self/fdinfo``, which lists
  what an epoll watches, and also the socket's inode.

It works across network and pid namespaces, and whoever holds the socket by then.

A look into fdinfo costs as much as there are registrations, and clients can bring it about.  So
streams are in groups of a hundred or so, each with an epoll of its own: what is asked about one
stream costs one group, however many there are.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import select
from collections.abc import Callable

from .limits import DAEMON_STREAM_GROUPS_MAX, DAEMON_STREAMS_PER_GROUP

_EPOLL_CTL_ADD, _EPOLL_CTL_MOD = 1, 3
_ENTRY = re.compile(rb"data:\s*([0-9a-f]+)\s+pos:\s*\d+\s+ino:([0-9a-f]+)")


class _EpollEvent(ctypes.Structure):
    # The kernel packs it on x86-64 only, for its 32-bit programs' sake.
    if platform.machine() in ("x86_64", "AMD64"):
        _pack_ = 1
    _fields_ = (("events", ctypes.c_uint32), ("data", ctypes.c_uint64))


# The standard library's epoll reports descriptor numbers, and ours are closed and reused;
# epoll_ctl(2) itself takes any number to report.  It never waits, so the GIL is kept.
_epoll_ctl = ctypes.PyDLL(None, use_errno=True).epoll_ctl
_EVENT = _EpollEvent(select.EPOLLET, 0)  # EPOLLHUP is always reported
_EVENT_AT = ctypes.byref(_EVENT)


def _error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))


class Group:
    """Some of the streams, by their connections' numbers."""

    __slots__ = ("_epoll", "_registrations", "fd", "inodes", "load", "numbers")

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self.fd = self._epoll.fileno()
        # Kept open, to be able to look also when no descriptor is left.
        self._registrations = os.open(f"/proc/self/fdinfo/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        #: those that had not ended when they were last looked at, and those that came since
        self.numbers: set[int] = set()
        #: sockets that were registered at the last look: of ended streams, too, as long as they
        #: are open
        self.load = 0
        self.inodes: list[int] = []  #: of the last look

    def add(self, fd: int, number: int) -> None:
        """Register the stream that ``fd`` is one end of."""
        _EVENT.data = number
        if _epoll_ctl(self.fd, _EPOLL_CTL_ADD, fd, _EVENT_AT) != 0:
            raise _error()
        self.numbers.add(number)

    def replace(self, fd: int, number: int) -> None:
        """As :meth:`add`, for a socket that may be registered by this descriptor already."""
        try:
            self.add(fd, number)
        except FileExistsError:
            if _epoll_ctl(self.fd, _EPOLL_CTL_MOD, fd, _EVENT_AT) != 0:
                raise _error() from None
            self.numbers.add(number)

    def close(self) -> None:
        """Forget all."""
        self._epoll.close()
        os.close(self._registrations)
        self._registrations = -1

    def hung_up(self) -> list[int]:
        """Return the streams whose connecting side has closed since the last call."""
        return [number for number, _ in self._epoll.poll(0, 4 * DAEMON_STREAMS_PER_GROUP)]

    def present(self) -> dict[int, int]:
        """Return the streams whose accepting side is open, and its inode."""
        if self._registrations < 0:
            return {}
        os.lseek(self._registrations, 0, os.SEEK_SET)
        text = b"".join(iter(lambda: os.read(self._registrations, 1 << 16), b""))
        found = _ENTRY.findall(text)
        return {int(number, 16): int(inode, 16) for number, inode in found}


class StreamLiveness:
    """The streams that were brokered.

    No call costs more than a look at two groups: each new stream pays for a look at about two
    others.
    """

    def __init__(self, end: Callable[[int], None]) -> None:
        """``end``: called with each stream that is found to have ended, perhaps more than once."""
        self._end = end
        self._events = select.epoll()  # of the groups
        #: a number that stands for each socket lent, and for nothing else in between
        self._lending = os.dup(self._events.fileno())
        #: by the number of its epoll, the one longest not looked at first
        self._groups: dict[int, Group] = {}
        self._with_room: dict[Group, None] = {}
        #: the next stream becomes one of it; None: it was filled
        self._current: Group | None = None
        self._filled: Group | None = None
        self._room = 0  # of the current one: for so many more, before it is looked at
        self._seen = 0  # its room when it was last looked at
        self._by_inode: dict[int, int] = {}

    def open(self) -> None:
        """Begin, in the process that goes on: ``/proc/self`` is the process that opens it."""
        self._use(self._new_group())

    def add(self, fd: int, number: int) -> Group:
        """Watch the stream that ``fd`` is one end of.  ``number`` fits 31 bits.

        Connection.watch is to be what is returned.
        """
        group = self._current or self._next_group()
        # Group.add() once more: every connect comes here.
        _EVENT.data = number
        if _epoll_ctl(group.fd, _EPOLL_CTL_ADD, fd, _EVENT_AT) != 0:
            raise _error()
        group.numbers.add(number)
        self._room -= 1
        if not self._room:
            self._current, self._filled = None, group
        return group

    def lend(self, fd: int, number: int, group: Group | None) -> Group:
        """As :meth:`add`, for a socket that may come back, and be lent again as another stream.

        ``group``: the one it was in before.  The kernel knows a registration by the socket and the
        descriptor's number, and the socket comes back with another one; so all are registered with
        the same.
        """
        is_new = group is None or self._groups.get(group.fd) is not group
        if group is None or is_new:
            group = self._current or self._next_group()
        os.dup2(fd, self._lending, inheritable=False)
        try:
            group.replace(self._lending, number)
        finally:
            os.dup2(self._events.fileno(), self._lending, inheritable=False)
        if is_new:
            self._room -= 1
            if not self._room:
                self._current, self._filled = None, group
        return group

    def _next_group(self) -> Group:
        """Return the group that the next stream becomes one of."""
        if self._filled is not None:
            filled, self._filled = self._filled, None
            self.look(filled)  # most streams are short: it has room again
            self.look_at_oldest()
        if self._current is not None:
            return self._current
        if self._with_room:
            return self._use(self._with_room.popitem()[0])
        if len(self._groups) < DAEMON_STREAM_GROUPS_MAX:
            return self._use(self._new_group())
        return self._use(next(iter(self._groups.values())))

    def _use(self, group: Group) -> Group:
        self._current = group
        self._room = self._seen = max(
            DAEMON_STREAMS_PER_GROUP // 2, DAEMON_STREAMS_PER_GROUP - group.load
        )
        return group

    def _new_group(self) -> Group:
        group = Group()
        self._events.register(group.fd, select.EPOLLIN)
        self._groups[group.fd] = group
        return group

    # Looking

    def groups(self) -> list[Group]:
        """Return all groups."""
        return list(self._groups.values())

    def end_hung_up(self, most: int = 8) -> None:
        """End the streams whose connecting side has closed since the last call, of ``most``
        groups.
        """
        for fd, _ in self._events.poll(0, most):
            for number in self._groups[fd].hung_up():
                self._end(number)

    def look(self, group: Group) -> None:
        """End the streams of ``group`` whose accepting side has closed since the last look.

        Costs as much as there are registrations in it.
        """
        if self._groups.get(group.fd) is not group:
            return  # it was closed
        found = group.present()
        ended = [number for number in group.numbers if number not in found]
        group.numbers.difference_update(ended)
        for inode in group.inodes:
            self._by_inode.pop(inode, None)
        group.inodes = list(found.values())
        for number, inode in found.items():
            self._by_inode[inode] = number
        group.load = len(found)
        self._groups[group.fd] = self._groups.pop(group.fd)
        self._with_room.pop(group, None)
        if group is self._current:
            self._seen = self._room
        elif group.load <= DAEMON_STREAMS_PER_GROUP // 2 and group is not self._filled:
            if self._current is None:
                self._use(group)
            elif found:
                self._with_room[group] = None
            else:
                self._close(group)
        for number in ended:
            self._end(number)

    def look_at_oldest(self) -> None:
        """As :meth:`look`, at the group that was longest not looked at."""
        self.look(next(iter(self._groups.values())))

    def find(self, inode: int) -> int | None:
        """Return the stream whose accepting side has this inode, if there is one.

        Of those lent only some are found: no program has them.
        """
        if inode not in self._by_inode:
            if self._current is None:
                self._next_group()
            elif self._seen != self._room:
                self.look(self._current)
        return self._by_inode.get(inode)

    def _close(self, group: Group) -> None:
        self._events.unregister(group.fd)
        del self._groups[group.fd]
        group.close()
