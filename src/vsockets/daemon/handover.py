"""The form in which a vsockd hands over its state to its successor.

Values are numbers, strings, tuples, lists and dicts of them, and no objects of classes, which the
next release may have changed.  A descriptor is its position among those that are sent beside them,
or, in the journal (:mod:`.journal`), its number, because the next vsockd has the same descriptors.
Sockets, channels and links refer to each other, so each has a number, in the order of first
mention.

The classes that are handed over have a method ``save``, and ``restore`` or a parameter with what
was saved.  :mod:`.succession` has the order of all of it, and the exchange between the two.
"""

from __future__ import annotations

import _socket
import functools
from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any

from ..fabric import (
    Connection,
    Context,
    Counts,
    Credentials,
    Endpoint,
    EndpointKind,
    Fabric,
    Isolation,
    Limits,
    Party,
    Profile,
    Rule,
    State,
    Trust,
)
from ..model.buffers import BufferSizes
from ..model.rates import ByteMeter

#: A saved object: plain values.
Saved = dict[str, Any]


class Early:
    """The objects that were sent before the rest of the state, by number."""

    def __init__(self) -> None:
        self.contexts: dict[int, Saved] = {}
        self.endpoints: dict[int, Saved] = {}
        # Values that differ after a change: comparing them takes less time than comparing rows.
        self.groups: dict[int, object] = {}
        self.channels: dict[int, object] = {}
        self.connections: set[int] = set()  #: nothing changes of an established stream


class Writer:
    """The state that a vsockd hands over: numbers that stand for objects, and descriptors."""

    def __init__(self, fabric: Fabric, lasting: bool = False) -> None:
        """Start without objects.

        With ``lasting``, changes of the objects are saved later: what changes too often, and can be
        found again in another way, is left out, and descriptors keep their numbers.
        """
        self.lasting = lasting
        self._fabric = fabric
        self._numbers = count()
        self.descriptors: list[int] = []
        self.endpoints: dict[Endpoint, int] = {}
        # Of classes of modules that import this one: channels, links of devices and relays, groups
        # of streams, and programs' datagram sockets.
        self.channels: dict[Any, int] = {}
        self.links: dict[Any, int] = {}
        self.groups: dict[Any, int] = {}
        self.receivers: dict[Any, int] = {}
        #: what was sent before the rest
        self.early = Early()
        self._positions: dict[object, int] = {}  # of descriptors, by their owners
        self._taken = 0  # descriptors that were taken to be sent
        self.find_parties(fabric)

    def find_parties(self, fabric: Fabric) -> None:
        """Look up the fabric's parties again, because they may have changed."""
        self._parties = {
            party: (context.cid, party.uid)
            for context in fabric.contexts
            for party in context.parties()
        }

    def _number(self, numbers: dict[Any, int], one: Any) -> int:
        found = numbers.get(one)
        if found is None:
            found = numbers[one] = next(self._numbers)
        return found

    def descriptor(self, fd: int, owner: object = None) -> int:
        """Return the number for a descriptor.

        With ``owner``, an object that never changes its descriptor, the descriptor is sent only
        once.
        """
        if self.lasting:
            return fd
        position = len(self.descriptors)
        if owner is not None:
            found = self._positions.setdefault(owner, position)
            if found != position:
                return found
        self.descriptors.append(fd)
        return position

    def take_descriptors(self) -> list[int]:
        """Return the descriptors that have got a number since the last call."""
        taken, self._taken = self._taken, len(self.descriptors)
        return self.descriptors[taken:]

    def descriptor_of(self, sock: _socket.socket | None) -> int | None:
        """Return the number for a socket's descriptor, or None if ``sock`` is None."""
        return None if sock is None else self.descriptor(sock.fileno())

    def party(self, party: Party | None) -> tuple[int, int] | None:
        """Return the CID and user id of a party; None for one of a context that was removed."""
        if party is None:
            return None
        found = self._parties.get(party)
        if found is None and self.lasting:  # a user of the host that has just connected
            self.find_parties(self._fabric)
            found = self._parties.get(party)
        return found

    def endpoint(self, endpoint: Endpoint | None) -> int | None:
        """Return the number for an endpoint, or None if ``endpoint`` is None."""
        if endpoint is None:
            return None
        return self._number(self.endpoints, endpoint)

    def number_of(self, endpoint: Endpoint) -> int:
        """Return the number for an endpoint."""
        return self._number(self.endpoints, endpoint)

    def channel(self, channel: Any) -> int | None:
        """Return the number for a channel, or None if ``channel`` is None."""
        return None if channel is None else self._number(self.channels, channel)

    def link(self, link: Any) -> int | None:
        """Return the number for a link: -1 if it was closed, None if ``link`` is None."""
        if link is None:
            return None
        return self._number(self.links, link) if link.is_open else -1

    def group(self, group: Any) -> int | None:
        """Return the number for a group of streams; None for one that was closed."""
        if self.lasting:
            return None if group is None or group.fd < 0 else int(group.fd)
        return self.groups.get(group)

    def receiver(self, receiver: Any) -> int:
        """Return the number for a program's datagram socket."""
        return self._number(self.receivers, receiver)


class ClosedLink:
    """A link that was closed before the state was saved."""

    is_open = False


class Reader:
    """The state that a vsockd takes over: the objects by their numbers, and the descriptors."""

    def __init__(self, fabric: Fabric, descriptors: Sequence[int]) -> None:
        """Start without objects."""
        self.fabric = fabric
        self.descriptors = descriptors
        self.endpoints: dict[int, Endpoint] = {}
        #: what endpoints refer to (:func:`.succession.save_handle`)
        self.handles: dict[int, Any] = {}
        self.channels: dict[int, Any] = {}
        self.links: dict[int, Any] = {}
        self.groups: dict[int, Any] = {}
        self.receivers: dict[int, Any] = {}
        self._closed_link = ClosedLink()
        self._former = Party("a removed context", None)

    def socket(self, number: int, type_: int) -> _socket.socket:
        """Return the unix socket whose descriptor has the number ``number``."""
        return _socket.socket(_socket.AF_UNIX, type_, 0, self.descriptors[number])

    def socket_or_none(self, number: int | None, type_: int) -> _socket.socket | None:
        """Return the unix socket with a descriptor's number, or None if ``number`` is None."""
        return None if number is None else self.socket(number, type_)

    def context(self, cid: int) -> Context:
        """Return the context with this CID, or one outside the fabric if the CID is unused."""
        return self.fabric.contexts.get(cid) or Context(cid, "", 0)

    def party(self, saved: tuple[int, int] | None) -> Party:
        """Return a party by its CID and user id."""
        return self._former if saved is None else self.context(saved[0]).party_of(saved[1])

    def link(self, number: int) -> object:
        """Return a link by its number; -1 stands for a closed link."""
        return self.links.get(number, self._closed_link)

    def endpoint(self, number: int | None) -> Endpoint | None:
        """Return an endpoint by its number."""
        return None if number is None else self.endpoints[number]


# The fabric's values


def save_context(context: Context) -> Saved:
    """Return a context as plain values, without its sockets."""
    isolation, limits = context.isolation, context.limits
    return {
        "cid": context.cid,
        "name": context.name,
        "owner": context.owner,
        "leases": context.leases,
        "isolation": [isolation.profile.value, isolation.unrestricted, isolation.domain],
        "limits": [
            limits.sockets,
            limits.pending_connects,
            limits.request_rate,
            limits.datagram_bytes,
        ],
        "reserved_ports": context.reserved_ports,
        "parent": context.parent,
        "reported_cid": context.reported_cid,
        "state": context.state.value,
        "fault_tolerant": context.fault_tolerant,
        "hybrid": context.hybrid,
        "counts": save_counts(context.counts),
        "following": [context.connected.following, context.datagrams.following],
        "moved": None if context.meter is None else (*context.meter.total,),
    }


def restore_context(fabric: Fabric, saved: Saved) -> None:
    """Add a context from plain values, or update an existing one."""
    contexts, named = fabric.contexts, (saved["name"], saved["owner"])
    context = contexts.get(saved["cid"])
    if context is None or (context.is_guest and named != (context.name, context.owner)):
        context = contexts.put(Context(saved["cid"], *named))  # the CID may have had another guest
    profile, unrestricted, domain = saved["isolation"]
    context.leases = saved["leases"]
    context.isolation = Isolation(Profile(profile), unrestricted, domain)
    context.set_limits(Limits(*saved["limits"]))
    context.reserved_ports = saved["reserved_ports"]
    context.parent = saved["parent"]
    context.reported_cid = saved["reported_cid"]
    context.state = State(saved["state"])
    context.fault_tolerant = saved["fault_tolerant"]
    context.hybrid = saved["hybrid"]
    restore_counts(context.counts, saved["counts"])
    context.connected.following, context.datagrams.following = saved["following"]
    context.meter = restore_meter(saved.get("moved"))  # a predecessor may not report it


def restore_meter(moved: tuple[float, float] | None) -> ByteMeter | None:
    """Return the meter of bytes that were reported before, if any were."""
    return None if moved is None else ByteMeter(*moved)


def save_counts(counts: Counts) -> Saved:
    """Return a context's counters."""
    return {
        "connects": counts.connects,
        "accepts": counts.accepts,
        "refusals": counts.refusals,
        "denials": {rule.value: number for rule, number in counts.denials.items()},
    }


def restore_counts(counts: Counts, saved: Saved) -> None:
    """Set a context's counters."""
    counts.connects, counts.accepts = saved["connects"], saved["accepts"]
    counts.refusals = saved["refusals"]
    counts.denials.update({Rule(rule): number for rule, number in saved["denials"].items()})


def save_fabric(fabric: Fabric, early: Early) -> Saved:
    """Return a fabric's contexts and counters, without endpoints and connections."""
    contexts = [save_context(context) for context in fabric.contexts]
    return {
        "contexts": [one for one in contexts if early.contexts.get(one["cid"]) != one],
        "removed": [cid for cid in early.contexts if fabric.contexts.get(cid) is None],
        "following": fabric.contexts.following,
        "departed": save_counts(fabric.departed),
        "last_number": fabric.last_number,
    }


def restore_fabric(fabric: Fabric, saved: Saved) -> None:
    """Restore in a new fabric the state that :func:`save_fabric` has returned."""
    for cid in saved["removed"]:
        fabric.contexts.remove(cid)
    for one in saved["contexts"]:
        restore_context(fabric, one)
    fabric.contexts.following = saved["following"]
    restore_counts(fabric.departed, saved["departed"])
    fabric.last_number = saved["last_number"]


def save_endpoint(writer: Writer, endpoint: Endpoint) -> Saved:
    """Return an endpoint as plain values, without its handle."""
    context, trust = endpoint.context, endpoint.trust
    ports = context.datagrams if endpoint.kind is EndpointKind.DATAGRAM else context.connected
    return {
        "kind": endpoint.kind.value,
        "context": context.cid,
        "cid": endpoint.cid,
        "port": endpoint.port,
        "owner": (*endpoint.owner,),
        "trust": trust and [trust.user, trust.privileged, sorted(trust.domains)],
        "cookie": endpoint.cookie,
        "has_cookie": context.cookies.get(endpoint.cookie) is endpoint,
        "inode": endpoint.inode,
        "listening": endpoint.listening,
        "pending": endpoint.pending,
        "sizes": (*endpoint.sizes,),
        "party": writer.party(endpoint.party),
        "has_port": ports.get(endpoint.port) is endpoint,
    }


def restore_endpoint(reader: Reader, saved: Saved) -> Endpoint:
    """Restore an endpoint from plain values, with its port and its cookie, and return it."""
    trust, context = saved["trust"], reader.context(saved["context"])
    endpoint = Endpoint(
        EndpointKind(saved["kind"]),
        context,
        saved["cid"],
        saved["port"],
        Credentials(*saved["owner"]),
        trust and Trust(trust[0], trust[1], frozenset(trust[2])),
        saved["cookie"],
        saved["inode"],
        None,
        saved["listening"],
        saved["pending"],
        BufferSizes(*saved["sizes"]),
        None if saved["party"] is None else reader.party(saved["party"]),
    )
    _claim(endpoint, saved)
    return endpoint


def update_endpoint(endpoint: Endpoint, saved: Saved) -> None:
    """Update the state of a stream endpoint whose port :func:`release_endpoint` has released."""
    endpoint.cookie, endpoint.inode = saved["cookie"], saved["inode"]
    endpoint.listening, endpoint.pending = saved["listening"], saved["pending"]
    endpoint.sizes = BufferSizes(*saved["sizes"])
    _claim(endpoint, saved)


def _claim(endpoint: Endpoint, saved: Saved) -> None:
    context = endpoint.context
    if saved["has_port"]:
        if endpoint.kind is EndpointKind.DATAGRAM:
            context.datagrams[endpoint.port] = endpoint
        else:
            context.connected[endpoint.port] = endpoint
        if endpoint.party is not None:
            endpoint.party.sockets += 1
    if saved["has_cookie"]:
        context.cookies[endpoint.cookie] = endpoint


def release_endpoint(endpoint: Endpoint) -> None:
    """Release the port and the cookie of a stream endpoint."""
    context = endpoint.context
    if context.connected.release(endpoint.port, endpoint) and endpoint.party is not None:
        endpoint.party.sockets -= 1
    if context.cookies.get(endpoint.cookie) is endpoint:
        del context.cookies[endpoint.cookie]


def save_connections(writer: Writer, connections: Iterable[Connection]) -> list[Any]:
    """Return connections as tuples: there may be very many, and requests wait meanwhile."""
    party_of, endpoint_of, group_of = writer.party, writer.endpoint, writer.group
    return [
        (
            one.number,
            one.context.cid,
            endpoint_of(one.listener),
            one.local,
            one.peer,
            one.size,
            (*one.sizes,),
            (*one.owner,),
            party_of(one.party),
            one.cookie,
            one.context.cookies.get(one.cookie) is one,
            one.context.connected.get(one.local[1]) is one,
            group_of(one.watch),
        )
        for one in connections
    ]


def restore_connections(reader: Reader, saved: Iterable[Any]) -> list[Connection]:
    """Restore connections from tuples, with the ports and cookies that they had; return them."""
    endpoints, groups = reader.endpoints, reader.groups
    # Most have these in common.
    sizes_of = functools.cache(lambda sizes: BufferSizes(*sizes))
    owner_of = functools.cache(lambda owner: Credentials(*owner))
    party_of, context_of = functools.cache(reader.party), functools.cache(reader.context)
    found = []
    for number, cid, listener, local, peer, size, sizes, owner, party, cookie, *rest in saved:
        has_cookie, has_port, group = rest
        context, owner, whose = context_of(cid), owner_of(owner), party_of(party)
        one = Connection(
            number,
            context,
            endpoints[listener],
            local,
            peer,
            size,
            sizes_of(sizes),
            owner,
            whose,
            cookie,
            None if group is None else groups[group],
        )
        if has_cookie:
            context.cookies[cookie] = one
        if has_port:
            context.connected[local[1]] = one
            whose.sockets += 1
        found.append(one)
    return found
