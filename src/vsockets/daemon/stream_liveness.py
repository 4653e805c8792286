"""Detection of the end of handed-off streams, without keeping them open.

vsockd must not keep a descriptor of a stream it brokered: the peers would never see its end.  But
an epoll registration outlives the descriptor it was made with as long as *any* process has the
socket open, and does not keep the socket open itself.  So each brokered stream is registered here,
in an epoll that is checked only occasionally:

- the connecting side closed: the kernel reports EPOLLHUP for the accepting side's socket;
- the accepting side closed: the registration is missing from ``/proc/self/fdinfo``, which lists
  what an epoll watches, including the socket's inode.

This works across network and pid namespaces, and for sockets passed to other processes.

Reading fdinfo costs time for each registration, and clients can cause it.  So streams are in groups
of a hundred or so, each with an epoll of its own: checking one stream costs one group, however many
streams there are.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
from collections.abc import Callable

from .._linux.libc import EpollEvent, last_error
from .handover import Reader, Saved, Writer
from .limits import DAEMON_STREAM_GROUPS_MAX, DAEMON_STREAMS_PER_GROUP

_EPOLL_CTL_ADD, _EPOLL_CTL_MOD = 1, 3
_ENTRY = re.compile(rb"data:\s*([0-9a-f]+)\s+pos:\s*\d+\s+ino:([0-9a-f]+)")


# The standard library's epoll reports descriptor numbers, and vsockd's are closed and reused;
# epoll_ctl(2) itself reports any number.  It never blocks, so the GIL is kept.
_epoll_ctl = ctypes.PyDLL(None, use_errno=True).epoll_ctl
_EVENT = EpollEvent(select.EPOLLET, 0)  # EPOLLHUP is always reported
_EVENT_AT = ctypes.byref(_EVENT)


class Group:
    """Some of the brokered streams, by connection number, registered in one epoll."""

    __slots__ = ("_epoll", "_registrations", "checks", "fd", "inodes", "numbers", "registered")

    def __init__(self, epoll: select.epoll | None = None) -> None:
        """Start with ``epoll``, which an earlier vsockd has registered streams in, or without."""
        self._epoll = select.epoll() if epoll is None else epoll
        self.fd = self._epoll.fileno()
        # Kept open, so that the group can be checked when no descriptor is left.
        self._registrations = os.open(f"/proc/self/fdinfo/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        #: streams that had not ended at the last check, and those added since
        self.numbers: set[int] = set()
        #: registered sockets at the last check, including those of ended streams that some
        #: process still has open
        self.registered = 0
        #: streams by the inode of their accepting end, at the last check
        self.inodes: dict[int, int] = {}
        self.checks = 0

    def add(self, fd: int, number: int) -> None:
        """Register the stream that ``fd`` is one end of."""
        _EVENT.data = number
        if _epoll_ctl(self.fd, _EPOLL_CTL_ADD, fd, _EVENT_AT) != 0:
            raise last_error()
        self.numbers.add(number)

    def replace(self, fd: int, number: int) -> None:
        """Register a stream; replace a registration that ``fd`` already has in this epoll."""
        try:
            self.add(fd, number)
        except FileExistsError:
            if _epoll_ctl(self.fd, _EPOLL_CTL_MOD, fd, _EVENT_AT) != 0:
                raise last_error() from None
            self.numbers.add(number)

    @property
    def version(self) -> object:
        """A value that differs after a change: only a check removes streams."""
        return self.checks, len(self.numbers)

    def save(self, writer: Writer) -> Saved:
        """Return the group's state for the next vsockd."""
        return {
            "epoll": writer.descriptor(self.fd, self),
            "numbers": list(self.numbers),
            "registered": self.registered,
            "inodes": list(self.inodes.items()),
        }

    @classmethod
    def restore(cls, reader: Reader, saved: Saved) -> Group:
        """Return a group that the previous vsockd has saved."""
        group = cls(select.epoll.fromfd(reader.descriptors[saved["epoll"]]))
        group.update(saved)
        return group

    def update(self, saved: Saved) -> None:
        """Restore the state that the previous vsockd has saved."""
        self.numbers = set(saved["numbers"])
        self.registered = saved["registered"]
        self.inodes = dict(saved["inodes"])
        self.checks += 1

    def close(self) -> None:
        """Close the group's epoll."""
        self._epoll.close()
        os.close(self._registrations)
        self.fd = self._registrations = -1

    def hung_up(self) -> list[int]:
        """Return the numbers of streams whose connecting side has closed since the last call."""
        return [number for number, _ in self._epoll.poll(0, 4 * DAEMON_STREAMS_PER_GROUP)]

    def alive(self) -> dict[int, int]:
        """Return the inodes of the accepting sides that are open, by number of the stream."""
        if self._registrations < 0:
            return {}
        os.lseek(self._registrations, 0, os.SEEK_SET)
        text = b"".join(iter(lambda: os.read(self._registrations, 1 << 16), b""))
        found = _ENTRY.findall(text)
        return {int(number, 16): int(inode, 16) for number, inode in found}


class StreamLiveness:
    """The registrations of all brokered streams.

    No call costs more than a check of two groups: each new stream pays for checking about two
    others.
    """

    def __init__(self, end: Callable[[int], None]) -> None:
        """Start without streams.

        ``end`` is called with the number of each stream found to have ended, possibly repeatedly.
        """
        self._end = end
        #: called before a group's descriptors, which may then be reused, are closed
        self.before_close: Callable[[], None] = lambda: None
        self._events = select.epoll()  # of the groups
        #: descriptor number under which handed-off sockets are registered, never used otherwise
        self._pending_fd = os.dup(self._events.fileno())
        #: by descriptor of its epoll, the one checked longest ago first
        self._groups: dict[int, Group] = {}
        self._with_room: dict[Group, None] = {}
        #: the group for the next stream; None: it is full
        self._current: Group | None = None
        self._filled: Group | None = None
        self._room = 0  # streams to add to the current group before it is checked
        self._checked_room = 0  # value of _room at the last check
        self._by_inode: dict[int, int] = {}

    def open(self) -> None:
        """Start watching.  Call it after vsockd has forked: it opens ``/proc/self``."""
        if self._current is None:
            self._use(self._new_group())

    def save_groups(self, writer: Writer) -> dict[int, Saved]:
        """Return the rows of all groups that have changed since they were saved, by number."""
        rows, early = {}, writer.early.groups
        for group in self._groups.values():
            writer.groups.setdefault(group, len(writer.groups))
            number, version = writer.group(group), group.version
            assert number is not None
            if early.get(number) != version:
                rows[number] = group.save(writer)
                early[number] = version
        return rows

    def save(self, writer: Writer) -> Saved:
        """Return the groups' state for the next vsockd; the one checked longest ago is first."""
        return {
            "groups": self.save_groups(writer),
            "order": [writer.group(group) for group in self._groups.values()],
            "current": writer.group(self._current),
            "filled": writer.group(self._filled),
            "with_room": [writer.group(group) for group in self._with_room],
            "room": [self._room, self._checked_room],
        }

    def restore_groups(self, reader: Reader, saved: dict[int, Saved]) -> None:
        """Add, or change, groups that the previous vsockd has saved."""
        for number, one in saved.items():
            group = reader.groups.get(number)
            if group is None:
                group = reader.groups[number] = Group.restore(reader, one)
                self._events.register(group.fd, select.EPOLLIN)
                self._groups[group.fd] = group
            else:
                self._forget_inodes(group)
                group.update(one)
            self._by_inode.update(group.inodes)

    def restore(self, reader: Reader, saved: Saved) -> None:
        """Restore the state that the previous vsockd has saved."""
        self.restore_groups(reader, saved["groups"])
        order = saved["order"]
        for number in reader.groups.keys() - set(order):
            self._forget_inodes(reader.groups[number])
            self._close(reader.groups.pop(number))
        self._groups = {(group := reader.groups[number]).fd: group for number in order}
        current, filled = saved["current"], saved["filled"]
        self._current = None if current is None else reader.groups[current]
        self._filled = None if filled is None else reader.groups[filled]
        self._with_room = {reader.groups[number]: None for number in saved["with_room"]}
        self._room, self._checked_room = saved["room"]

    def add(self, fd: int, number: int) -> Group:
        """Register the stream that ``fd`` is one end of.  ``number`` fits 31 bits.

        The caller sets Connection.watch to the returned group.
        """
        group = self._current or self._next_group()
        # Group.add() inlined: hot path of every connect.
        _EVENT.data = number
        if _epoll_ctl(group.fd, _EPOLL_CTL_ADD, fd, _EVENT_AT) != 0:
            group.replace(fd, number)  # a vsockd that was killed then has registered it
        group.numbers.add(number)
        self._room -= 1
        if not self._room:
            self._current, self._filled = None, group
        return group

    def add_pending(self, fd: int, number: int, group: Group | None) -> Group:
        """Register, as :meth:`add`, a socket that may come back and be handed off again.

        ``group`` is its previous group.  The kernel identifies a registration by socket and
        descriptor number, and the socket comes back under another number; so all such sockets are
        registered under the same number.
        """
        is_new = group is None or self._groups.get(group.fd) is not group
        if group is None or is_new:
            group = self._current or self._next_group()
        os.dup2(fd, self._pending_fd, inheritable=False)
        try:
            group.replace(self._pending_fd, number)
        finally:
            os.dup2(self._events.fileno(), self._pending_fd, inheritable=False)
        if is_new:
            self._room -= 1
            if not self._room:
                self._current, self._filled = None, group
        return group

    def _next_group(self) -> Group:
        """Return the group of registrations to add the next stream to."""
        if self._filled is not None:
            filled, self._filled = self._filled, None
            self.check(filled)  # most streams are short: the group may have space again
            self.check_oldest()
        if self._current is not None:
            return self._current
        if self._with_room:
            return self._use(self._with_room.popitem()[0])
        if len(self._groups) < DAEMON_STREAM_GROUPS_MAX:
            return self._use(self._new_group())
        return self._use(next(iter(self._groups.values())))

    def _use(self, group: Group) -> Group:
        self._current = group
        self._room = self._checked_room = max(
            DAEMON_STREAMS_PER_GROUP // 2, DAEMON_STREAMS_PER_GROUP - group.registered
        )
        return group

    def _new_group(self) -> Group:
        group = Group()
        self._events.register(group.fd, select.EPOLLIN)
        self._groups[group.fd] = group
        return group

    # Checking

    def groups(self) -> list[Group]:
        """Return all groups."""
        return list(self._groups.values())

    def end_hung_up(self, most: int = 8) -> None:
        """End streams whose connecting side has closed since the last call, of ``most`` groups."""
        for fd, _ in self._events.poll(0, most):
            for number in self._groups[fd].hung_up():
                self._end(number)

    def check(self, group: Group) -> None:
        """Check ``group``: end its streams whose accepting side has closed since the last check.

        The cost grows with the number of registrations in the group.
        """
        if self._groups.get(group.fd) is not group:
            return  # the group was closed
        found = group.alive()
        ended = [number for number in group.numbers if number not in found]
        group.numbers.difference_update(ended)
        for number in ended:  # before the group is closed
            self._end(number)
        group.checks += 1
        self._forget_inodes(group)
        group.inodes = {inode: number for number, inode in found.items()}
        self._by_inode.update(group.inodes)
        group.registered = len(found)
        self._groups[group.fd] = self._groups.pop(group.fd)
        self._with_room.pop(group, None)
        if group is self._current:
            self._checked_room = self._room
        elif group.registered <= DAEMON_STREAMS_PER_GROUP // 2 and group is not self._filled:
            if self._current is None:
                self._use(group)
            elif found:
                self._with_room[group] = None
            else:
                self._close(group)

    def _forget_inodes(self, group: Group) -> None:
        for inode in group.inodes:
            self._by_inode.pop(inode, None)

    def check_oldest(self) -> None:
        """Check the group that was checked longest ago."""
        if self._groups:  # a vsockd that is started again may continue a request without any
            self.check(next(iter(self._groups.values())))

    def inodes(self) -> dict[int, int]:
        """Return the inodes of accepting ends at the last check, by number of the stream."""
        return {number: inode for inode, number in self._by_inode.items()}

    def find(self, inode: int) -> int | None:
        """Return the number of the stream whose accepting side has this inode, or None.

        Streams handed off to a device are found only sometimes: no program has them.
        """
        if inode not in self._by_inode:
            if self._current is None:
                self._next_group()
            elif self._checked_room != self._room:
                self.check(self._current)
        return self._by_inode.get(inode)

    def _close(self, group: Group) -> None:
        self.before_close()
        fd = group.fd
        self._events.unregister(fd)
        del self._groups[fd]
        group.close()
