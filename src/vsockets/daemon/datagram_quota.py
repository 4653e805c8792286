"""The routes of a party: descriptors of vsockd, and the unread datagrams sent over them.

vsockd is not on the path of a datagram, but it has a duplicate of every route (:mod:`.datagrams`),
and the kernel reports how many bytes sent over it are unread.  They are memory of the host's
kernel, which a guest may fill.  The last reported value is kept with each route, and their sum with
the party, so the cost of a new route does not depend on their number.
"""

from __future__ import annotations

import _socket
import errno
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from socket import SHUT_RDWR

from .._linux.inspection import unread_bytes
from ..fabric import Denied, Party, Rule
from .named_sockets import NamedSocket

#: Routes to measure in one step (some 50 microseconds); and for each new route, of the youngest and
#: of the oldest ones.
_ROUTES_PER_STEP = 64
_YOUNGEST = 4
_OLDEST = 8


def _route_bytes_max() -> int:
    """Return the most unread bytes a socket can have, as the kernel accounts: twice wmem_max."""
    try:
        return 2 * int(Path("/proc/sys/net/core/wmem_max").read_text())
    except (OSError, ValueError):
        return 2 * 212_992


_ROUTE_BYTES_MAX = _route_bytes_max()


@dataclass(slots=True, eq=False)
class DatagramSocket(NamedSocket):
    """A program's datagram socket: not the socket itself, only paths to it."""

    quota: DatagramQuota  #: of its party
    routes: dict[tuple[int, int], Route] = field(default_factory=dict)

    def close(self) -> None:
        """Revoke every route from this socket, and close the path to it."""
        for route in list(self.routes.values()):
            route.revoke()
        NamedSocket.close(self)


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
        """Add the route to ``inbound``, the routes to the destination's context."""
        self.sock = sock
        self.sender = sender
        self.destination = destination
        self.inbound = inbound
        self.queued = 0  #: unread bytes at the last measurement
        inbound[self] = None
        sender.routes[destination] = self
        sender.quota.add(self)

    def revoke(self) -> None:
        """Prevent any process from sending over the route.  Does nothing the second time."""
        if self.inbound.pop(self, self) is None:
            del self.sender.routes[self.destination]
            self.sender.quota.revoke(self)


class DatagramQuota:
    """The routes of one party and their unread bytes."""

    def __init__(self, party: Party, limited: bool) -> None:
        """Limit unread bytes if ``limited`` is True: the party is a guest."""
        self._party = party
        self._limited = limited
        self._routes: dict[Route, None] = {}  # the oldest first
        #: revoked routes with unread bytes
        self._draining: set[Route] = set()
        #: routes with unread bytes at the last measurement, the one measured longest ago first
        self._unread: dict[Route, None] = {}
        self._queued = 0  # sum of the last measured values

    def __bool__(self) -> bool:
        return bool(self._routes or self._draining)

    @property
    def needs_watching(self) -> bool:
        """True if the routes together can hold more unread bytes than the party's limit."""
        return self._limited and self._party.routes * _ROUTE_BYTES_MAX > self._limit

    @property
    def _limit(self) -> int:
        assert self._party.limits is not None
        return self._party.limits.datagram_bytes

    def require_space(self) -> None:
        """Raise Denied when the party has reached its limit of unread bytes."""
        if not self.needs_watching:
            return
        # A program that fills one route after the other has just filled the youngest ones; for
        # the others see :meth:`measure`.
        for route in list(islice(reversed(self._routes), _YOUNGEST)):
            self._measure(route)
        if self._queued > self._limit:
            self.reclaim()
        if self._queued > self._limit:
            reason = f"{self._party.name} has {self._queued} bytes of unread datagrams"
            raise Denied(errno.ENOBUFS, Rule.DATAGRAM_BYTES, reason)

    def add(self, route: Route) -> None:
        """Count ``route`` as one of the party's from now on."""
        self._routes[route] = None
        self._party.routes += 1

    def revoke(self, route: Route) -> None:
        """Shut ``route`` down; it is counted until its datagrams are read."""
        route.sock.shutdown(SHUT_RDWR)
        del self._routes[route]
        self._draining.add(route)
        if self._limited:
            self._measure(route)
        else:
            self._close(route)

    def revoke_all(self) -> None:
        """Revoke every route."""
        for route in list(self._routes):
            route.revoke()

    def evict_oldest(self) -> None:
        """Close one of the oldest routes, to make space for another one.

        Its program requests it again when needed.  A route with unread bytes is not closed: only
        its duplicate tells when they have been read.
        """
        self.reclaim()
        for route in list(islice(self._routes, _OLDEST)):
            if not self._party.has_all_routes:
                return
            if self._limited and unread_bytes(route.sock.fileno()):
                self._routes[route] = self._routes.pop(route)  # move it to the youngest
            else:
                route.revoke()

    def queued(self) -> int:
        """Return the unread bytes, as the kernel accounts them: more than the payload."""
        for _ in self.measure():
            pass
        return self._queued

    def measure(self) -> Iterator[None]:
        """Measure every route, in steps."""
        for number, route in enumerate([*self._routes, *self._draining]):
            self._measure(route)
            if number % _ROUTES_PER_STEP == _ROUTES_PER_STEP - 1:
                yield

    def revoke_unread(self) -> Iterator[None]:
        """Revoke every route with unread bytes, in steps."""
        for number, route in enumerate(list(self._unread)):
            route.revoke()
            if number % _ROUTES_PER_STEP == _ROUTES_PER_STEP - 1:
                yield

    @property
    def exceeds(self) -> bool:
        """True if the last measured values exceed the party's limit."""
        return self._limited and self._queued > self._limit

    def reclaim(self) -> None:
        """Measure some of the routes with unread bytes: some of those may have been read."""
        for route in list(islice(self._unread, _ROUTES_PER_STEP)):
            self._measure(route)

    def close(self) -> None:
        """Revoke and close all routes of a party that is removed."""
        self.revoke_all()
        for route in list(self._draining):
            self._close(route)

    def _measure(self, route: Route) -> None:
        if route.sock.fileno() < 0:
            return  # it was closed since the previous step
        queued = unread_bytes(route.sock.fileno())
        self._queued += queued - route.queued
        route.queued = queued
        self._unread.pop(route, None)
        if queued:
            self._unread[route] = None
        elif route in self._draining:
            self._close(route)

    def _close(self, route: Route) -> None:
        self._queued -= route.queued
        self._routes.pop(route, None)
        self._draining.discard(route)
        self._unread.pop(route, None)
        self._party.routes -= 1
        route.sock.close()
