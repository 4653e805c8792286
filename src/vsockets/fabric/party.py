"""Parties: the units that the fabric counts and limits.

A guest is one party, whichever of its programs makes a request; on the host each user is one party.
Administrators (root and the fabric's owner) are not limited: they control the host in any case.
"""

from __future__ import annotations

import errno
from typing import Protocol

from ..model.rate_limit import TokenBucket
from .errors import Denied, Rule
from .settings import Limits


class PendingListener(Protocol):
    """A listener with pending connections."""

    def recount_pending(self) -> None:
        """Update the count of pending connections from what the kernel reports as accepted."""


class Party:
    """Counts and limits of one guest, or of one user of the host."""

    __slots__ = (
        "__weakref__",
        "blocked",
        "channels",
        "limits",
        "name",
        "pending",
        "pending_listeners",
        "request_bucket",
        "routes",
        "sockets",
        "unwanted",
    )

    def __init__(self, name: str, limits: Limits | None) -> None:
        """Start with no holdings; ``name`` is for messages, ``limits=None`` sets no limit."""
        self.name = name
        #: ports held by its sockets: bound ones, and local ends of streams it opened
        self.sockets = 0
        #: routes from its datagram sockets to destinations, each a descriptor of vsockd
        self.routes = 0
        #: its connections not yet accepted, and its connections to vsockd without a request yet
        self.pending = 0
        #: listeners with pending connections of this party, to be recounted in this order
        self.pending_listeners: dict[PendingListener, None] = {}
        self.channels = 0  #: connections to vsockd that vsockd keeps open
        #: seconds for which closing what it sent has blocked vsockd since its last turn
        self.blocked = 0.0
        self.unwanted = 0  #: descriptors that it sent without reason and that wait to be closed
        self.set_limits(limits)

    def set_limits(self, limits: Limits | None) -> None:
        """Set the limits from now on."""
        self.limits = limits
        self.request_bucket = None if limits is None else TokenBucket(limits.request_rate)

    @property
    def is_in_use(self) -> bool:
        """True if the party holds anything that is counted."""
        return bool(self.sockets or self.routes or self.pending or self.channels)

    def is_at_limit(self) -> bool:
        """Return whether the party has reached its limit of sockets or of pending connections."""
        limits = self.limits
        return limits is not None and (
            self.pending >= limits.pending_connects or self.sockets >= limits.sockets
        )

    def check_socket_limit(self) -> None:
        """Raise Denied when the party has reached its limit of sockets."""
        if self.limits is not None and self.sockets >= self.limits.sockets:
            raise Denied(errno.ENOBUFS, Rule.SOCKETS, f"{self.name} has {self.sockets} sockets")

    @property
    def has_all_routes(self) -> bool:
        """True if the party has reached its limit of routes, which is that of sockets."""
        return self.limits is not None and self.routes >= self.limits.sockets

    def check_route_limit(self) -> None:
        """Raise Denied when the party has reached its limit of routes."""
        if self.has_all_routes:
            reason = f"{self.name} has {self.routes} routes for datagrams"
            raise Denied(errno.ENOBUFS, Rule.SOCKETS, reason)

    def check_rate(self, now: float) -> None:
        """Raise Denied when the party exceeds its request rate at time ``now``, in seconds."""
        if self.request_bucket is not None and not self.request_bucket.try_take(now):
            reason = f"{self.name} makes more than {self.request_bucket.rate} requests per second"
            raise Denied(errno.ENOBUFS, Rule.REQUEST_RATE, reason)

    def check_pending_limit(self) -> None:
        """Raise Denied when the party has reached its limit of pending connections."""
        if self.limits is not None and self.pending >= self.limits.pending_connects:
            reason = f"{self.name} has {self.pending} pending connections"
            raise Denied(errno.ENOBUFS, Rule.PENDING_CONNECTS, reason)

    def __repr__(self) -> str:
        return f"<party {self.name}>"
