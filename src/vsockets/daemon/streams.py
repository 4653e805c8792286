"""The streams vsockd has brokered: detecting their end, and disconnecting them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..eventloop.loop import EventLoop
from ..fabric import Connection, Fabric
from .channel import Channel
from .deferred_work import Chores
from .disconnect import Disconnector
from .stream_liveness import Group, StreamLiveness

#: Check for ended streams after this many new ones, and this many seconds after the last one.
_REAP_EVERY = 256
_REAP_AFTER = 1.0
_REAP_AT_THE_LATEST = 60.0


class Streams:
    """Every known stream.  vsockd has no descriptor of any of them."""

    def __init__(self, loop: EventLoop, fabric: Fabric, chores: Chores) -> None:
        self._loop = loop
        self._fabric = fabric
        self._chores = chores
        self._watch = StreamLiveness(fabric.end)
        self.add = self._watch.add
        self._cutter = Disconnector(loop, chores)
        self._unreaped = 0
        self._reap_delay: float | None = None  # None: no timer is set

    def begin(self) -> None:
        """Start watching, after vsockd has forked."""
        self._watch.open()

    def lend(self, channel: Channel, connection: Connection) -> None:
        """Register the socket of a channel handed off to a device, which may return it."""
        group = self._watch.lend(channel.sock.fileno(), connection.number, channel.watch)
        connection.watch = channel.watch = group

    def find_accepted(self, inode: int) -> Connection | None:
        """Return the stream whose accepting end has this inode."""
        number = self._watch.find(inode)
        return None if number is None else self._fabric.connections.get(number)

    def inodes(self) -> dict[int, int]:
        """Return the inode of each stream's accepting end, by the connection's number."""
        return {
            number: inode
            for group in self._watch.groups()
            for number, inode in group.present().items()
        }

    def cut(self, connections: Iterable[Connection]) -> list[Connection]:
        """Disconnect streams; return those not disconnected yet (:class:`.Disconnector`)."""
        return self._cutter.cut(connections)

    # Releasing ended streams

    def reap(self) -> None:
        """Release every stream that has ended by now."""
        self._watch.end_hung_up(max(1, len(self._watch.groups())))
        for _ in self._look_through():
            pass

    def reap_one(self, connection: Connection) -> None:
        """Release ``connection`` if it has ended."""
        assert isinstance(connection.watch, Group)
        for number in connection.watch.hung_up():
            self._fabric.end(number)
        if connection.number in self._fabric.connections:
            self._watch.look(connection.watch)

    def reap_some(self) -> None:
        """Release some of the ended streams now, the others as deferred work."""
        self._watch.end_hung_up()
        self._watch.look_at_oldest()
        self._chores.start(self, self._look_through())

    def reap_sometimes(self) -> None:
        """Release ended streams from time to time; called for every new stream."""
        self._unreaped += 1
        if self._unreaped >= _REAP_EVERY:
            self._unreaped = 0
            self._watch.end_hung_up()
        if self._reap_delay is None:
            self._loop.call_later(_REAP_AFTER, self._reap_later)
        self._reap_delay = _REAP_AFTER

    def _reap_later(self) -> None:
        assert self._reap_delay is not None
        self.reap_some()
        if self._fabric.connections:
            self._loop.call_later(self._reap_delay, self._reap_later)
            self._reap_delay = min(self._reap_delay * 2, _REAP_AT_THE_LATEST)
        else:
            self._reap_delay = None

    def _look_through(self) -> Iterator[None]:
        for group in self._watch.groups():
            self._watch.look(group)
            yield
