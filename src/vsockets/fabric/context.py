"""Contexts: the virtual machines, and the host, as the fabric sees them."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

from ..address import FIRST_GUEST_CID, LAST_GUEST_CID
from ..constants import VMADDR_CID_HOST, VMADDR_CID_HYPERVISOR
from .counts import Counts
from .endpoint import Connection, Endpoint, Kernel, Kind
from .errors import Denied, Refused, Rule
from .life_cycle import State
from .meter import Meter
from .ports import Ports
from .settings import Isolation, Limits


class Context:
    """One context: its CID, its state, and the ports its endpoints hold."""

    __slots__ = (
        "__weakref__",
        "beyond",
        "cid",
        "connected",
        "cookies",
        "counts",
        "datagrams",
        "fault_tolerant",
        "hybrid",
        "is_guest",
        "isolation",
        "kernel",
        "leases",
        "limits",
        "meter",
        "name",
        "owner",
        "pending",
        "state",
    )

    def __init__(self, cid: int, name: str, owner: int, leased: bool = False) -> None:
        self.cid = cid
        self.name = name
        self.owner = owner  #: the user id that owns the virtual machine
        #: whether this is a virtual machine, rather than the host or its hypervisor
        self.is_guest = cid >= FIRST_GUEST_CID
        self.isolation = Isolation()
        self.state = State.RUNNING
        self.fault_tolerant = False
        self.limit(Limits())
        #: connections of this context that wait to be accepted, and programs that came in and
        #: have said nothing
        self.pending = 0
        self.counts = Counts()
        #: how many hold a lease on it: it ends with the last.  0: it ends when it is removed
        self.leases = int(leased)
        #: stream and seqpacket ports: bound endpoints, and the ports of connecting sockets
        self.connected: Ports[Endpoint | Connection] = Ports()
        self.datagrams: Ports[Endpoint] = Ports()
        #: sockets by the kernel's number for them, to know one that came as a bare descriptor.
        #: It is the program's own word, and the first to claim one keeps it: a lie hides or
        #: misnames at most a socket of the liar's own context.
        self.cookies: dict[int, Endpoint | Connection] = {}
        #: of a virtual machine with a device
        self.kernel: Kernel | None = None
        #: the unix socket behind which its ports are for tools of hybrid vsock; "": none
        self.hybrid = ""
        #: with it: what the host has for this guest at a port where no program of the fabric
        #: listens
        self.beyond: Callable[[Kind, int], Endpoint | None] | None = None

    @property
    def leased(self) -> bool:
        """Whether it ends with its last lease."""
        return self.leases > 0

    @property
    def sockets(self) -> int:
        """How many ports its sockets hold."""
        return len(self.connected) + len(self.datagrams)

    def limit(self, limits: Limits) -> None:
        """Set how much of vsockd it may have.  The host and the hypervisor have no limits."""
        self.limits = limits
        self.meter = Meter(limits.request_rate)

    def is_at_a_limit(self) -> bool:
        """Whether a guest has as many sockets, or as many connections that wait, as it may."""
        return self.is_guest and (
            self.pending >= self.limits.pending_connects
            or len(self.connected) + len(self.datagrams) >= self.limits.sockets
        )

    def require_room(self) -> None:
        """Raise Denied when a guest holds as many sockets as it may."""
        if self.is_guest and len(self.connected) + len(self.datagrams) >= self.limits.sockets:
            raise Denied(
                errno.ENOBUFS, Rule.SOCKETS, f"context {self.cid} has {self.sockets} sockets"
            )

    def require_pace(self, now: float) -> None:
        """Raise Denied when a guest asks more often than it may; ``now`` in seconds."""
        if self.is_guest and not self.meter.take(now):
            reason = f"context {self.cid} asks more than {self.meter.rate} times a second"
            raise Denied(errno.ENOBUFS, Rule.REQUEST_RATE, reason)

    def require_patience(self) -> None:
        """Raise Denied when too many connections of a guest wait already."""
        if self.pending >= self.limits.pending_connects and self.is_guest:
            reason = f"{self.pending} connections of context {self.cid} wait"
            raise Denied(errno.ENOBUFS, Rule.PENDING_CONNECTS, reason)

    def __repr__(self) -> str:
        return f"<context {self.cid} {self.name!r}>"


class Contexts:
    """The contexts there are, running or not.  CIDs are unique, and leased without a race."""

    def __init__(self, owner: int) -> None:
        self._by_cid: dict[int, Context] = {}
        #: the context with this CID, if there is one
        self.get = self._by_cid.get
        self._next = FIRST_GUEST_CID
        self.hypervisor = self._put(Context(VMADDR_CID_HYPERVISOR, "hypervisor", owner))
        self.host = self._put(Context(VMADDR_CID_HOST, "host", owner))

    def __len__(self) -> int:
        return len(self._by_cid)

    def __iter__(self) -> Iterator[Context]:
        return iter(self._by_cid.values())

    def add(self, cid: int | None, name: str, owner: int, leased: bool = False) -> Context:
        """A new guest, running.  Without a CID it gets a free one: the next not used lately.

        A lease on a guest that lives by leases already is one more lease on it.  Refused with
        EINVAL (not a guest's CID) or EEXIST (in use).
        """
        if cid is None:
            cid = self._free_cid()
        elif not FIRST_GUEST_CID <= cid <= LAST_GUEST_CID:
            raise Refused(
                errno.EINVAL,
                f"CID {cid} is not a guest's: expected {FIRST_GUEST_CID} to {LAST_GUEST_CID}",
            )
        elif cid in self._by_cid:
            context = self._by_cid[cid]
            if not (leased and context.leased):
                raise Refused(errno.EEXIST, f"context {cid} exists")
            context.leases += 1
            return context
        return self._put(Context(cid, name or f"guest-{cid}", owner, leased))

    def require(self, cid: int) -> Context:
        """The context with this CID.  Refused with ENOENT."""
        context = self._by_cid.get(cid)
        if context is None:
            raise Refused(errno.ENOENT, f"no context {cid}")
        return context

    def remove(self, cid: int) -> Context:
        """Forget a guest.  Refused with ENOENT or, for the host, EINVAL."""
        context = self.require(cid)
        if not context.is_guest:
            raise Refused(
                errno.EINVAL, f"context {cid} is the {context.name}: it cannot be removed"
            )
        del self._by_cid[cid]
        return context

    def _put(self, context: Context) -> Context:
        self._by_cid[context.cid] = context
        return context

    def _free_cid(self) -> int:
        while self._next in self._by_cid:
            self._next = self._next + 1 if self._next < LAST_GUEST_CID else FIRST_GUEST_CID
        cid = self._next
        self._next = cid + 1 if cid < LAST_GUEST_CID else FIRST_GUEST_CID
        return cid
