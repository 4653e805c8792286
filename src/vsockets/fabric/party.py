"""Parties: whom the fabric counts and limits.

A guest is one, whichever of its programs asks; on the host each user is one.  Administrators (root
and the fabric's owner) can do as they like in any case, so they have no limits.
"""

from __future__ import annotations

import errno
from typing import Protocol

from ..model.rate_limit import TokenBucket
from .errors import Denied, Rule
from .settings import Limits


class Awaited(Protocol):
    """A listening socket."""

    def count_waiting(self) -> None:
        """Find out which connections have been accepted there."""


class Party:
    """What one guest, or one user of the host, has of the fabric."""

    __slots__ = (
        "__weakref__",
        "awaited",
        "channels",
        "limits",
        "meter",
        "name",
        "pending",
        "routes",
        "sockets",
        "unwanted",
    )

    def __init__(self, name: str, limits: Limits | None) -> None:
        """``name``: for people.  ``limits``: None for a party that has none."""
        self.name = name
        #: ports that its sockets hold: bound ones, and the ends of streams that they began
        self.sockets = 0
        #: ways from its datagram sockets to those it sends to, each a descriptor of vsockd
        self.routes = 0
        #: its connections that wait to be accepted, and programs that connected to vsockd and
        #: sent no request yet
        self.pending = 0
        #: listening sockets that some of those may wait at, to be asked in this order; the fabric
        #: never looks inside
        self.awaited: dict[Awaited, None] = {}
        self.channels = 0  #: connections to vsockd that vsockd keeps
        self.unwanted = 0  #: descriptors that it sent, and that are to be closed
        self.limit(limits)

    def limit(self, limits: Limits | None) -> None:
        """Set how much it may have, from now on."""
        self.limits = limits
        self.meter = None if limits is None else TokenBucket(limits.request_rate)

    @property
    def has_something(self) -> bool:
        """Whether anything is counted as its own."""
        return bool(self.sockets or self.routes or self.pending or self.channels)

    def is_at_a_limit(self) -> bool:
        """Return whether it has as many sockets, or as many waiting connections, as it may."""
        limits = self.limits
        return limits is not None and (
            self.pending >= limits.pending_connects or self.sockets >= limits.sockets
        )

    def require_room(self) -> None:
        """Raise Denied when it holds as many sockets as it may."""
        if self.limits is not None and self.sockets >= self.limits.sockets:
            raise Denied(errno.ENOBUFS, Rule.SOCKETS, f"{self.name} has {self.sockets} sockets")

    @property
    def has_all_routes(self) -> bool:
        """Whether it has as many routes as it may: as many as sockets."""
        return self.limits is not None and self.routes >= self.limits.sockets

    def require_route(self) -> None:
        """Raise Denied when it has as many routes as it may."""
        if self.has_all_routes:
            reason = f"{self.name} has {self.routes} routes for datagrams"
            raise Denied(errno.ENOBUFS, Rule.SOCKETS, reason)

    def require_pace(self, now: float) -> None:
        """Raise Denied when it asks more often than it may; ``now`` in seconds."""
        if self.meter is not None and not self.meter.take(now):
            reason = f"{self.name} asks more than {self.meter.rate} times a second"
            raise Denied(errno.ENOBUFS, Rule.REQUEST_RATE, reason)

    def require_patience(self) -> None:
        """Raise Denied when too many of its connections wait already."""
        if self.limits is not None and self.pending >= self.limits.pending_connects:
            reason = f"{self.pending} connections of {self.name} wait"
            raise Denied(errno.ENOBUFS, Rule.PENDING_CONNECTS, reason)

    def __repr__(self) -> str:
        return f"<party {self.name}>"
