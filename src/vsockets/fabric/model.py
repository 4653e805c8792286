"""The fabric's values: contexts, ports, endpoints, connections, parties, and refusals.

:mod:`.policy`, :mod:`.life_cycle` and :mod:`.fabric` decide about them.
"""

from __future__ import annotations

import errno
import os
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, Protocol, TypeVar

from ..model.address import FIRST_GUEST_CID, LARGEST, LAST_GUEST_CID
from ..model.buffers import BufferSizes
from ..model.constants import LAST_RESERVED_PORT, VMADDR_CID_HOST, VMADDR_CID_HYPERVISOR
from ..model.rates import ByteMeter, TokenBucket
from .limits import EPHEMERAL_PORT_TRIES_MAX, HOST_USERS_REMEMBERED_MAX
from .settings import Grant, Isolation, Limits


class Refused(Exception):
    """A refused request: the program gets ``errno``, the log gets ``reason`` as well.

    The peer never receives the reason: an errno that separates "forbidden" from "absent" would
    disclose to a guest what exists beside it.
    """

    def __init__(self, errno: int, reason: str) -> None:
        super().__init__(f"{os.strerror(errno)}: {reason}")
        self.errno = errno
        self.reason = reason


class Rule(Enum):
    """The rule that a denial is based on.  The value is its name in the audit log."""

    AUTHENTIC_SOURCE = "authentic-source"  #: source addresses cannot be spoofed
    RESERVED_PORT = "reserved-port"  #: ports below 1024 need CAP_NET_BIND_SERVICE
    HYPERVISOR_SERVICE = "hypervisor-service"  #: CID 0 is reserved for the fabric's owner
    GUEST_TO_GUEST = "guest-to-guest"  #: guests communicate with the host only
    RESTRICTED = "restricted"  #: isolated guest: hypervisor services and trusted endpoints only
    DOMAIN = "domain"  #: ESX 4.0 to 5.0: different ``vmci0.domain``
    SUSPENDED = "suspended"  #: the virtual machine is suspended
    FAULT_TOLERANCE = "fault-tolerance"  #: no new connections in FT mode
    CAPTURE = "capture"  #: capturing at a device needs a grant or the fabric's owner
    SOCKETS = "sockets"  #: this and the next three: limits, named as in the configuration
    PENDING_CONNECTS = "pending_connects"
    REQUEST_RATE = "request_rate"
    DATAGRAM_BYTES = "datagram_bytes"


LIMIT_RULES = (Rule.SOCKETS, Rule.PENDING_CONNECTS, Rule.REQUEST_RATE, Rule.DATAGRAM_BYTES)


class Denied(Refused):
    """A request refused by a policy or limit, rather than because its target does not exist."""

    def __init__(self, errno: int, rule: Rule, reason: str) -> None:
        super().__init__(errno, reason)
        self.rule = rule


_FIRST_EPHEMERAL = LAST_RESERVED_PORT + 1
_LAST_EPHEMERAL = LARGEST - 1  # LARGEST is VMADDR_PORT_ANY

Holder = TypeVar("Holder")


class Ports(dict[int, Holder]):
    """Holders of a context's ports in one namespace, by port number.

    Streams and sequenced packets share a namespace, datagrams have their own, as in Linux.
    """

    def __init__(self) -> None:
        super().__init__()
        # Upwards from a random start through four billion ports: a released port is the last to
        # be assigned again, so a late packet or a slow peer of the old holder does not reach the
        # new one.
        #: the port that is assigned next, unless it is held
        self.following = random.randint(_FIRST_EPHEMERAL, _LAST_EPHEMERAL)

    def claim(self, port: int, holder: Holder) -> None:
        """Assign ``port`` to ``holder``.

        Raises Refused with EADDRINUSE when it is held.
        """
        if port in self:
            raise Refused(errno.EADDRINUSE, f"port {port} is in use")
        self[port] = holder

    def next_ephemeral(self) -> int:
        """Return a free port of the range that needs no privilege, without assigning it.

        Raises Refused with EADDRNOTAVAIL, as Linux does, when several consecutive ports are held;
        the next call continues after those.
        """
        port = self.following
        if port in self:
            port = self.find_ephemeral()
        self.following = _after(port)
        return port

    def find_ephemeral(self, is_reserved: Callable[[int], bool] | None = None) -> int:
        """Return the port that :meth:`next_ephemeral` returns next.

        Ports for which ``is_reserved`` returns True are skipped, as held ones are.

        Raises Refused as :meth:`next_ephemeral`.
        """
        for _ in range(EPHEMERAL_PORT_TRIES_MAX):
            port = self.following
            if port not in self and (is_reserved is None or not is_reserved(port)):
                return port
            self.following = _after(port)
        raise Refused(
            errno.EADDRNOTAVAIL, f"{EPHEMERAL_PORT_TRIES_MAX} consecutive ports are in use"
        )

    def release(self, port: int, holder: Holder) -> bool:
        """Release a port; return whether ``holder`` still held it."""
        if self.get(port) is not holder:
            return False
        del self[port]
        return True


def _after(port: int) -> int:
    return port + 1 if port < _LAST_EPHEMERAL else _FIRST_EPHEMERAL


class State(Enum):
    """The run state of a virtual machine."""

    RUNNING = "running"
    SUSPENDED = "suspended"
    OFF = "off"


class EndpointKind(Enum):
    """A socket type.  The value is its name in reports and options."""

    STREAM = "stream"
    SEQPACKET = "seqpacket"
    DATAGRAM = "dgram"


class Credentials(NamedTuple):
    """A process's identity, as the kernel reports it."""

    pid: int
    uid: int
    gid: int


class Program(Protocol):
    """The program that makes a request.

    The program's rights are read from the kernel only if a decision depends on them.
    """

    @property
    def credentials(self) -> Credentials:
        """The program's process, user and group ids."""

    def has_capability(self, capability: int) -> bool:
        """Return whether the program has a capability, given by number (``capabilities(7)``)."""

    def matches(self, grant: Grant) -> bool:
        """Return whether ``grant`` applies to the program."""


@dataclass(frozen=True, slots=True)
class Trust:
    """The trust of a program's endpoint of one socket type."""

    user: int
    privileged: bool  #: True if trusted for every guest, by a capability or by a grant
    domains: frozenset[str]  #: the domains the program belongs to, for guests of the legacy profile

    def for_context(self, context: Context) -> bool:
        """Return whether the endpoint is trusted for the virtual machine ``context``."""
        return self.privileged or self.user == context.owner


class Counts:
    """Counters of one context's activity.  The counters only increase."""

    __slots__ = ("accepts", "connects", "denials", "refusals")

    def __init__(self) -> None:
        self.connects = 0  #: streams established by programs of the context
        self.accepts = 0  #: streams established to listeners of the context
        self.refusals = 0  #: requests answered with an errno, including denials
        #: denials of requests of the context's programs, by rule
        self.denials: Counter[Rule] = Counter()

    def add(self, other: Counts) -> None:
        """Increase each counter by that of ``other``."""
        self.connects += other.connects
        self.accepts += other.accepts
        self.refusals += other.refusals
        self.denials.update(other.denials)


@dataclass(slots=True, eq=False)
class Endpoint:
    """A socket that holds a port: bound, and possibly listening."""

    kind: EndpointKind
    context: Context
    cid: int  #: the context's CID, or VMADDR_CID_LOCAL for one reachable from its own context only
    port: int
    owner: Credentials
    trust: Trust | None = None  #: set for the host's endpoints only
    cookie: int = 0
    inode: int = 0  #: the socket's inode as its program reported it, to show its holders; 0 unknown
    handle: Any = None  #: vsockd's object for the socket, opaque to the fabric
    listening: bool = False
    #: True if the device or hybrid relay behind the port decides whether a listener exists
    pending: bool = False
    sizes: BufferSizes = field(default_factory=BufferSizes)
    party: Party | None = None  #: the party that holds the port; None if it holds none

    @property
    def address(self) -> tuple[int, int]:
        """``(cid, port)`` as returned by getsockname()."""
        return self.cid, self.port


class DeviceDatagrams(Protocol):
    """The socket that receives all datagrams to a guest with a device."""

    def close(self) -> None:
        """Revoke every route from the guest, and close the path to the socket."""


class DeviceStreams(Protocol):
    """A device's link to vsockd: the handle of the guest's stream endpoints."""

    def close(self) -> None:
        """Detach the device from its context, so that no program can reach the guest's ports."""

    def refresh(self) -> None:
        """Report the host's ports again after a change of the guest's state or isolation."""

    def set_datagrams(self, datagrams: DeviceDatagrams) -> None:
        """Set the socket that receives datagrams to the guest's ports."""

    def send_capture(self, fd: int, limit: int, port: int) -> None:
        """Send ``fd`` to the device, which writes captured records to it.

        Raises OSError when the link is full.
        """

    def send_buffer_size(self, own: tuple[int, int], peer: tuple[int, int], size: int) -> None:
        """Report the size of the receive buffer that ``peer`` has for the guest's address ``own``.

        Raises OSError when the link is full.
        """


@dataclass(frozen=True, slots=True)
class DevicePorts:
    """The ports that a guest's device serves; the guest's kernel decides about each of them."""

    owner: Credentials  #: the device's process
    streams: DeviceStreams  #: handle of the guest's stream endpoints
    datagrams: DeviceDatagrams | None  #: handle of the guest's datagram endpoints; None: refused
    seqpacket: bool = False  #: True if ``streams`` accepts sequenced packet sockets, too

    def endpoint(self, context: Context, kind: EndpointKind, port: int) -> Endpoint | None:
        """Return a pending endpoint for ``port``; None if the guest lacks this socket type."""
        streams = kind is not EndpointKind.DATAGRAM
        handle = self.streams if streams else self.datagrams
        if handle is None or (kind is EndpointKind.SEQPACKET and not self.seqpacket):
            return None
        return Endpoint(
            kind,
            context,
            context.cid,
            port,
            self.owner,
            handle=handle,
            listening=streams,
            pending=True,
        )


@dataclass(slots=True, eq=False)
class Connection:
    """An established stream.  vsockd knows of it, and none of its bytes pass through vsockd."""

    number: int
    context: Context  #: the connecting side's
    listener: Endpoint  #: the accepting side's, which may have been closed since
    local: tuple[int, int]  #: the connecting side's address
    peer: tuple[int, int]  #: the accepting side's address
    size: int  #: the buffer size both sides agreed on, in bytes
    sizes: BufferSizes  #: the connecting side's requested buffer sizes
    owner: Credentials  #: the connecting process
    party: Party  #: the connecting side's
    cookie: int = 0
    watch: object = None  #: vsockd's registration that detects the stream's end; opaque here
    #: the connecting side's bytes; None while no process has reported them
    meter: ByteMeter | None = None

    @property
    def kind(self) -> EndpointKind:
        """Socket type: stream or seqpacket."""
        return self.listener.kind

    @property
    def peer_context(self) -> Context:
        """The accepting side's context."""
        return self.listener.context


class Context:
    """One context: its CID, its state, and the ports its endpoints hold."""

    __slots__ = (
        "__weakref__",
        "_guest",
        "_many_users",
        "_users",
        "cid",
        "connected",
        "cookies",
        "counts",
        "datagrams",
        "device",
        "fallback",
        "fault_tolerant",
        "hybrid",
        "is_guest",
        "isolation",
        "leases",
        "limits",
        "meter",
        "name",
        "owner",
        "parent",
        "reported_cid",
        "reserved_ports",
        "state",
    )

    def __init__(self, cid: int, name: str, owner: int, leased: bool = False) -> None:
        self.cid = cid
        self.name = name
        self.owner = owner  #: user id of the virtual machine's owner
        #: True for a virtual machine, False for the host and the hypervisor
        self.is_guest = cid >= FIRST_GUEST_CID
        self.isolation = Isolation()
        #: CID of the guest that has started this one, which the two may reach; 0 without one
        self.parent = 0
        #: CID that programs under ``vsock run`` get for their own from ``/dev/vsock``; 0: the CID
        self.reported_cid = 0
        #: True if programs of this context may bind ports below 1024 without a capability
        self.reserved_ports = False
        self.state = State.RUNNING
        self.fault_tolerant = False
        #: limits of the guest, or of each user of the host
        self.limits = Limits()
        self._guest = Party(f"context {cid}", self.limits) if self.is_guest else None
        #: parties of the host, by user id
        self._users: dict[int, Party] = {}
        self._many_users = HOST_USERS_REMEMBERED_MAX
        self.counts = Counts()
        #: number of leases: the context is removed with the last one. 0: removed on request only
        self.leases = int(leased)
        #: stream and seqpacket ports: bound endpoints, and local ports of connected sockets
        self.connected: Ports[Endpoint | Connection] = Ports()
        self.datagrams: Ports[Endpoint] = Ports()
        #: Sockets by SO_COOKIE, to identify one that arrives as a bare descriptor.  Programs
        #: claim the value themselves, and the first claim wins: a false claim hides or misnames
        #: at most a socket of the claiming program's own context.
        self.cookies: dict[int, Endpoint | Connection] = {}
        #: ports served by the guest's device; None without one
        self.device: DevicePorts | None = None
        #: bytes of the guest's streams, by its present device and earlier ones; None without any
        self.meter: ByteMeter | None = None
        #: path of the unix socket that offers the guest's ports as hybrid vsock; "" without one
        self.hybrid = ""
        #: hybrid vsock: returns the host's endpoint for this guest at a port on which no program
        #: of the fabric listens
        self.fallback: Callable[[EndpointKind, int], Endpoint | None] | None = None

    @property
    def leased(self) -> bool:
        """True if the context is removed with its last lease."""
        return self.leases > 0

    @property
    def sockets(self) -> int:
        """Number of ports that sockets of the context hold."""
        return len(self.connected) + len(self.datagrams)

    @property
    def pending(self) -> int:
        """Number of pending connections of all parties in the context: see :class:`.Party`."""
        return sum(party.pending for party in self.parties())

    def party_of(self, uid: int) -> Party:
        """Return the party that a program of user ``uid`` in this context is counted as."""
        if self._guest is not None:
            return self._guest
        party = self._users.get(uid)
        if party is None:
            limited = self.cid == VMADDR_CID_HOST and uid not in (0, self.owner)
            party = Party(f"user {uid} of the host", self.limits if limited else None, uid)
            if len(self._users) >= self._many_users:
                self._users = {uid: one for uid, one in self._users.items() if one.is_in_use}
                self._many_users = max(HOST_USERS_REMEMBERED_MAX, 2 * len(self._users))
            self._users[uid] = party
        return party

    def set_limits(self, limits: Limits) -> None:
        """Set the limits of the guest, or of each user of the host."""
        self.limits = limits
        for party in self.parties():
            if party.limits is not None:
                party.set_limits(limits)

    def parties(self) -> list[Party]:
        """Return the guest's party, or the parties of the host's users that this context has."""
        return list(self._users.values()) if self._guest is None else [self._guest]

    def __repr__(self) -> str:
        return f"<context {self.cid} {self.name!r}>"


class Contexts:
    """All contexts, whether powered on or off.  CIDs are unique."""

    def __init__(self, owner: int) -> None:
        self._by_cid: dict[int, Context] = {}
        #: returns the context with a CID, or None
        self.get = self._by_cid.get
        #: the CID that is assigned next, unless it is in use
        self.following = FIRST_GUEST_CID
        #: CIDs that are assigned only on explicit request
        self.reserved: Collection[int] = ()
        self.hypervisor = self.put(Context(VMADDR_CID_HYPERVISOR, "hypervisor", owner))
        self.host = self.put(Context(VMADDR_CID_HOST, "host", owner))

    def __len__(self) -> int:
        return len(self._by_cid)

    def __iter__(self) -> Iterator[Context]:
        return iter(self._by_cid.values())

    def add(self, cid: int | None, name: str, owner: int, leased: bool = False) -> Context:
        """Add a running guest, or one more lease on a leased guest.

        Without ``cid``, assign the next free CID after the last one assigned.

        Raises Refused with EINVAL for a CID outside the guests' range and EEXIST for one in use.
        """
        if cid is None:
            cid = self._free_cid()
        elif not FIRST_GUEST_CID <= cid <= LAST_GUEST_CID:
            raise Refused(
                errno.EINVAL,
                f"CID {cid} is not a guest's (expected {FIRST_GUEST_CID} to {LAST_GUEST_CID})",
            )
        elif cid in self._by_cid:
            context = self._by_cid[cid]
            if not (leased and context.leased):
                raise Refused(errno.EEXIST, f"context {cid} exists")
            context.leases += 1
            return context
        return self.put(Context(cid, name or f"guest-{cid}", owner, leased))

    def require(self, cid: int) -> Context:
        """Return the context with this CID.

        Raises Refused with ENOENT when it does not exist.
        """
        context = self._by_cid.get(cid)
        if context is None:
            raise Refused(errno.ENOENT, f"no context {cid} (see: vsock context ls)")
        return context

    def remove(self, cid: int) -> Context:
        """Remove a guest.

        Raises Refused with ENOENT when it does not exist and EINVAL for the host or hypervisor.
        """
        context = self.require(cid)
        if not context.is_guest:
            raise Refused(
                errno.EINVAL, f"context {cid} is the {context.name}: it cannot be removed"
            )
        del self._by_cid[cid]
        return context

    def put(self, context: Context) -> Context:
        """Add a context whose CID is not in use; return it."""
        self._by_cid[context.cid] = context
        return context

    def _free_cid(self) -> int:
        while self.following in self._by_cid or self.following in self.reserved:
            self.following = (
                self.following + 1 if self.following < LAST_GUEST_CID else FIRST_GUEST_CID
            )
        cid = self.following
        self.following = cid + 1 if cid < LAST_GUEST_CID else FIRST_GUEST_CID
        return cid


class PendingListener(Protocol):
    """A listener with pending connections."""

    def recount_pending(self) -> None:
        """Update the count of pending connections from what the kernel reports as accepted."""


class Party:
    """Counts and limits of one guest, or of one user of the host.

    A guest is one party, whichever of its programs makes a request.  Administrators (root and the
    fabric's owner) are not limited: they control the host in any case.
    """

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
        "uid",
        "unwanted",
    )

    def __init__(self, name: str, limits: Limits | None, uid: int = 0) -> None:
        """Start with no holdings; ``name`` is for messages, ``limits=None`` sets no limit."""
        self.name = name
        self.uid = uid  #: of a user of the host
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
        """True if the party has sockets, connections, routes or anything else that is counted."""
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
