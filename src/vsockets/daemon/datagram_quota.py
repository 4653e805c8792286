"""The routes of a party: descriptors of vsockd, and the datagrams that are on their way on them.

vsockd is not on the way of a datagram, but it has a duplicate of every route (:mod:`.datagrams`)
and the kernel tells how much was sent on it and not yet received: memory of the host's kernel,
which a guest may fill.  What it told last is kept with each route, and the sum with all of them, so
a new route costs the same however many there are.
"""

from __future__ import annotations

import _socket
import array
import errno
import fcntl
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from socket import SHUT_RDWR
from termios import TIOCOUTQ  # the same ioctl as SIOCOUTQ: bytes sent and not yet received
from typing import TYPE_CHECKING

from ..fabric import Denied, Party, Rule

if TYPE_CHECKING:
    from .datagrams import DatagramSocket

#: Routes that are looked at in one go: some 50 microseconds; and for each new one.
_LOOKS = 64
_YOUNGEST = 4
_OLDEST = 8


def _most_on_a_route() -> int:
    """Return the bytes one socket can have on their way, as the kernel counts: twice wmem_max."""
    try:
        return 2 * int(Path("/proc/sys/net/core/wmem_max").read_text())
    except (OSError, ValueError):
        return 2 * 212_992


_MOST_ON_A_ROUTE = _most_on_a_route()


class Route:
    """A socket that sends from one datagram socket to one address."""

    __slots__ = ("destination", "inbound", "queued", "sender", "sock")

    def __init__(
        self,
        sock: _socket.socket,
        sender: DatagramSocket,
        destination: tuple[int, int],
        inbound: dict[Route, None],
    ) -> None:
        """``inbound``: all routes to the destination's context; this one becomes one of them."""
        self.sock = sock
        self.sender = sender
        self.destination = destination
        self.inbound = inbound
        self.queued = 0  #: bytes on their way when it was last looked at
        inbound[self] = None
        sender.routes[destination] = self
        sender.outflow.add(self)

    def revoke(self) -> None:
        """Let nothing be sent on it again, by any process.  Harmless the second time."""
        if self.inbound.pop(self, self) is None:
            del self.sender.routes[self.destination]
            self.sender.outflow.revoke(self)


class DatagramQuota:
    """The routes of one party."""

    def __init__(self, party: Party, limited: bool) -> None:
        """``limited``: the party is a guest, whose datagrams on their way are limited."""
        self._party = party
        self._limited = limited
        self._routes: dict[Route, None] = {}  # the oldest first
        #: revoked, with something on its way yet
        self._draining: set[Route] = set()
        #: those that had something on its way when they were last looked at, the longest ago first
        self._loaded: dict[Route, None] = {}
        self._queued = 0  # the sum of theirs

    def __bool__(self) -> bool:
        return bool(self._routes or self._draining)

    @property
    def needs_watching(self) -> bool:
        """Whether its routes together can hold more than the party may have on its way."""
        return self._limited and self._party.routes * _MOST_ON_A_ROUTE > self._most

    @property
    def _most(self) -> int:
        assert self._party.limits is not None
        return self._party.limits.datagram_bytes

    def require_space(self) -> None:
        """Raise Denied when as much is on its way as may be."""
        if not self.needs_watching:
            return
        # A program that fills one after the other has filled the youngest just now; for the rest
        # see :meth:`look`.
        for route in list(islice(reversed(self._routes), _YOUNGEST)):
            self._look(route)
        if self._queued > self._most:
            self.settle()
        if self._queued > self._most:
            reason = f"{self._queued} bytes of datagrams of {self._party.name} wait"
            raise Denied(errno.ENOBUFS, Rule.DATAGRAM_BYTES, reason)

    def add(self, route: Route) -> None:
        """Count ``route`` as one of the party's from now on."""
        self._routes[route] = None
        self._party.routes += 1

    def revoke(self, route: Route) -> None:
        """Shut ``route`` down; it is counted until nothing is on its way."""
        route.sock.shutdown(SHUT_RDWR)
        del self._routes[route]
        self._draining.add(route)
        if self._limited:
            self._look(route)
        else:
            self._close(route)

    def revoke_all(self) -> None:
        """Revoke every route."""
        for route in list(self._routes):
            route.revoke()

    def give_way(self) -> None:
        """Close a route, one of the oldest, so that there can be another one.

        Its program asks for it again when it needs it.  One with something on its way is not
        closed: it is needed to know when that has been received.
        """
        self.settle()
        for route in list(islice(self._routes, _OLDEST)):
            if not self._party.has_all_routes:
                return
            if self._limited and queued_on(route.sock):
                self._routes[route] = self._routes.pop(route)  # the youngest
            else:
                route.revoke()

    def queued(self) -> int:
        """Return the bytes on their way, as the kernel counts: more than the datagrams have."""
        for _ in self.look():
            pass
        return self._queued

    def look(self) -> Iterator[None]:
        """Find out what is on its way on each route, in pieces."""
        for number, route in enumerate([*self._routes, *self._draining]):
            self._look(route)
            if number % _LOOKS == _LOOKS - 1:
                yield

    def revoke_loaded(self) -> Iterator[None]:
        """Revoke every route with something on its way, in pieces."""
        for number, route in enumerate(list(self._loaded)):
            route.revoke()
            if number % _LOOKS == _LOOKS - 1:
                yield

    @property
    def exceeds(self) -> bool:
        """Whether more is on its way than may be, as far as is known."""
        return self._limited and self._queued > self._most

    def settle(self) -> None:
        """Find out what of that has been received, as far as that is done in one go."""
        for route in list(islice(self._loaded, _LOOKS)):
            self._look(route)

    def close(self) -> None:
        """Revoke and close all; the party is no more."""
        self.revoke_all()
        for route in list(self._draining):
            self._close(route)

    def _look(self, route: Route) -> None:
        if route.sock.fileno() < 0:
            return  # it was closed since the piece before
        queued = queued_on(route.sock)
        self._queued += queued - route.queued
        route.queued = queued
        self._loaded.pop(route, None)
        if queued:
            self._loaded[route] = None
        elif route in self._draining:
            self._close(route)

    def _close(self, route: Route) -> None:
        self._queued -= route.queued
        self._routes.pop(route, None)
        self._draining.discard(route)
        self._loaded.pop(route, None)
        self._party.routes -= 1
        route.sock.close()


def queued_on(sock: _socket.socket) -> int:
    """Return the bytes on their way on one route."""
    answer = array.array("i", [0])
    fcntl.ioctl(sock.fileno(), TIOCOUTQ, answer)
    return answer[0]
