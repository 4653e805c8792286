"""The streams vsockd has brokered: detecting their end, and disconnecting them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..eventloop.loop import EventLoop
from ..fabric import Connection, Fabric
from .channel import Channel
from .disconnect import Disconnector
from .scheduling import DeferredWork
from .stream_liveness import Group, StreamLiveness

#: Check for ended streams after this many new ones, and this many seconds after the last one.
_REAP_EVERY = 256
_REAP_AFTER = 1.0
_REAP_AT_THE_LATEST = 60.0


class Streams:
    """Every known stream.  vsockd has no descriptor of any of them."""

    def __init__(self, loop: EventLoop, fabric: Fabric, deferred: DeferredWork) -> None:
        self._loop = loop
        self._fabric = fabric
        self._deferred = deferred
        self._liveness = StreamLiveness(fabric.end)
        self.add = self._liveness.add
        self._disconnector = Disconnector(loop, deferred)
        self._new_streams = 0
        self._reap_delay: float | None = None  # None: no timer is set

    def open(self) -> None:
        """Start watching, after vsockd has forked."""
        self._liveness.open()

    def add_pending(self, channel: Channel, connection: Connection) -> None:
        """Register the socket of a channel handed off to a device, which may return it."""
        group = self._liveness.add_pending(channel.sock.fileno(), connection.number, channel.watch)
        connection.watch = channel.watch = group

    def find_accepted(self, inode: int) -> Connection | None:
        """Return the stream whose accepting end has this inode."""
        number = self._liveness.find(inode)
        return None if number is None else self._fabric.connections.get(number)

    def inodes(self) -> dict[int, int]:
        """Return the inode of each stream's accepting end, by the connection's number."""
        return {
            number: inode
            for group in self._liveness.groups()
            for number, inode in group.alive().items()
        }

    def disconnect(self, connections: Iterable[Connection]) -> list[Connection]:
        """Disconnect streams; return those not disconnected yet (:class:`.Disconnector`)."""
        return self._disconnector.disconnect(connections)

    def disconnect_problem(self, connection: Connection) -> str:
        """Return the reason why a stream could not be disconnected yet."""
        return self._disconnector.problem(connection)

    # Releasing ended streams

    def reap(self) -> None:
        """Release every stream that has ended by now."""
        self._liveness.end_hung_up(max(1, len(self._liveness.groups())))
        for _ in self._check_all():
            pass

    def reap_one(self, connection: Connection) -> None:
        """Release ``connection`` if it has ended."""
        assert isinstance(connection.watch, Group)
        for number in connection.watch.hung_up():
            self._fabric.end(number)
        if connection.number in self._fabric.connections:
            self._liveness.check(connection.watch)

    def reap_some(self) -> None:
        """Release some of the ended streams now, the others as deferred work."""
        self._liveness.end_hung_up()
        self._liveness.check_oldest()
        self._deferred.start(self, self._check_all())

    def reap_sometimes(self) -> None:
        """Release ended streams from time to time; called for every new stream."""
        self._new_streams += 1
        if self._new_streams >= _REAP_EVERY:
            self._new_streams = 0
            self._liveness.end_hung_up()
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

    def _check_all(self) -> Iterator[None]:
        for group in self._liveness.groups():
            self._liveness.check(group)
            yield
