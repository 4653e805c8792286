"""Streams from programs of the fabric to somebody behind a unix socket of the host.

A program has connected to vsockd, whose end of that came here.  Its other end is what the program
has, and cannot be exchanged; so the two sockets are joined by a pump, inside the kernel.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from functools import partial

from ...splice import SplicedPair, SplicePump
from ..client import DeviceClient, Offer
from ..loop import DeviceLoop
from .connector import Connector, Done
from .limits import HYBRID_CONNECTIONS_MAX

#: epoll(7) tells of hang-ups whether asked or not.
_HANG_UP = 0


class _Stream(SplicedPair):
    """A joined pair, which tells when it has ended."""

    ended: Callable[[], None]

    def finished(self, why: OSError | None) -> None:
        self.ended()


class HostToGuest:
    """All of them; ``dial`` makes an attempt to reach a port."""

    def __init__(
        self, loop: DeviceLoop, fabric: DeviceClient, dial: Callable[[int, Done], Connector]
    ) -> None:
        self._loop = loop
        self._fabric = fabric
        self._dial = dial
        self._pump = SplicePump(loop)
        self._attempts: dict[Offer, Connector] = {}
        self._idle: Callable[[], None] | None = None

    @property
    def streams(self) -> int:
        """How many there are, those included that nobody has accepted yet."""
        return len(self._attempts) + len(self._pump.connections)

    def offered(self, offer: Offer) -> None:
        """Somebody wants to connect."""
        if self.streams >= HYBRID_CONNECTIONS_MAX:
            self._refuse(offer, errno.ECONNRESET)
            return
        dial = self._attempts[offer] = self._dial(offer.port, partial(self._decided, offer))
        # Should who connects not want it any more.
        self._loop.watch_for(offer.sock.fileno(), lambda events: self._give_up(offer), _HANG_UP)
        dial.start()

    def drop(self) -> None:
        """End all of them."""
        for offer in list(self._attempts):
            self._give_up(offer)
        self._pump.close()

    def finish(self, idle: Callable[[], None]) -> None:
        """Call ``idle`` when there are none any more."""
        self._idle = idle
        self._look_whether_idle()

    def _give_up(self, offer: Offer) -> None:
        self._attempts[offer].cancel()
        self._decided(offer, None, errno.ECONNRESET)

    def _decided(self, offer: Offer, sock: socket.socket | None, code: int) -> None:
        del self._attempts[offer]
        self._loop.unwatch(offer.sock.fileno())
        if sock is None:
            self._refuse(offer, code)
        else:
            self._fabric.settle(offer, offer.sizes.size)
            stream = _Stream(self._pump, offer.sock, sock)
            stream.ended = self._look_whether_idle
            self._pump.start(stream)

    def _refuse(self, offer: Offer, code: int) -> None:
        self._fabric.settle(offer, error=code)
        offer.sock.close()
        self._look_whether_idle()

    def _look_whether_idle(self) -> None:
        if self._idle is not None and not self.streams:
            self._idle()
