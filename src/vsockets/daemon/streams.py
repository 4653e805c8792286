"""The streams vsockd has brokered: noticing their end, and bringing it about."""

from __future__ import annotations

from collections.abc import Iterable

from ..fabric import Connection, Fabric
from .cutting import Cutter
from .loop import Loop
from .watch import StreamWatch

#: Look for ended streams after so many new ones, and so many seconds after the last.
_REAP_EVERY = 256
_REAP_AFTER = 1.0
_REAP_AT_THE_LATEST = 60.0


class Streams:
    """Every stream there is, as far as is known.  vsockd holds no descriptor of one."""

    def __init__(self, loop: Loop, fabric: Fabric) -> None:
        self._loop = loop
        self._fabric = fabric
        self._watch = StreamWatch()
        self.add, self.lend = self._watch.add, self._watch.lend
        self._cutter = Cutter(loop, self._watch)
        self._unreaped = 0
        self._reap_delay: float | None = None  # None: no timer is set

    def begin(self) -> None:
        """Called once, in the process that goes on."""
        self._watch.open()

    def find_accepted(self, inode: int) -> Connection | None:
        """The stream whose accepting end has this inode."""
        for number, found in self._watch.present().items():
            if found == inode:
                return self._fabric.connections.get(number)
        return None

    def inodes(self) -> dict[int, int]:
        """The inode of each stream's accepting end, by the connection's number."""
        return self._watch.present()

    def cut(self, connections: Iterable[Connection]) -> list[Connection]:
        """End streams whoever holds them; returns those that go on (:class:`.Cutter`)."""
        return self._cutter.cut(connections)

    def reap(self) -> None:
        """Forget every stream that has ended, as of now."""
        self._reap_hung_up()
        if self._fabric.connections:
            present = self._watch.present()
            for number in [n for n in self._fabric.connections if n not in present]:
                self._fabric.end(number)

    def reap_sometimes(self) -> None:
        """Called for every new stream."""
        self._unreaped += 1
        if self._unreaped >= _REAP_EVERY:
            self._reap_hung_up()
        if self._reap_delay is None:
            self._reap_delay = _REAP_AFTER
            self._loop.call_later(_REAP_AFTER, self._reap_later)
        else:
            self._reap_delay = _REAP_AFTER

    def _reap_later(self) -> None:
        assert self._reap_delay is not None
        self.reap()
        if self._fabric.connections:
            self._loop.call_later(self._reap_delay, self._reap_later)
            self._reap_delay = min(self._reap_delay * 2, _REAP_AT_THE_LATEST)
        else:
            self._reap_delay = None

    def _reap_hung_up(self) -> None:
        self._unreaped = 0
        for number in self._watch.hung_up():
            self._fabric.end(number)
