"""Invariants of :mod:`.fabric_world`, checked after each step."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from by_the_guide import HOST, Program
from vsockets.fabric import Connection, Endpoint, EndpointKind, Fabric

from .simulated_kernel import SimulatedChannel, SimulatedLink

if TYPE_CHECKING:
    from .fabric_world import FabricWorld

DATAGRAM = EndpointKind.DATAGRAM


def check_policy(
    world: FabricWorld,
    client: SimulatedChannel,
    target: SimulatedChannel | SimulatedLink,
    connecting: bool,
) -> None:
    """The guide allows what the fabric has allowed."""
    here, there = client.machine, target.machine
    verdict, _ = world.guide.way(here, there.cid, 5000, connecting)
    assert not verdict, f"policy breach: {here} to {there}"
    if here is not there and HOST in (here.cid, there.cid):
        program: Program | None = client.program or client.process.program
        if there.cid == HOST and isinstance(target, SimulatedChannel):
            program = target.program
        guest = here if there.cid == HOST else there
        if guest.is_guest:
            assert program is not None, "a listener that is not bound"
            meets = world.guide.meets(guest, program, client.kind.value)
            assert meets, f"policy breach: {guest} and {program} of the host"


def check_holders(world: FabricWorld) -> None:
    """Each port, cookie and stream of the fabric belongs to a socket that exists, and reversely."""
    fabric = world.fabric
    endpoints = {
        id(one.endpoint) for one in world.channels if one.is_known and one.endpoint is not None
    }
    for context in fabric.contexts:
        machine = world.machines.get(context.cid)
        assert machine is not None, f"context {context.cid} exists"
        assert context.state.value == machine.state
        if machine.state == "off":
            assert not context.sockets, "a machine that is off has sockets"
        for port, holder in [*context.connected.items(), *context.datagrams.items()]:
            if isinstance(holder, Connection):
                assert fabric.connections.get(holder.number) is holder, f"leaked: {port}"
                assert holder.local[1] == port
            else:
                assert id(holder) in endpoints, f"leaked: port {port} of {context.cid}"
                assert holder.port == port
        held = [*context.connected.values(), *context.datagrams.values()]
        for cookie, owner in context.cookies.items():
            assert owner in held, f"cookie {cookie} of a closed socket"
        counts = context.counts
        total = counts.connects + counts.accepts + counts.refusals
        assert total >= world.counted.get(machine, 0), "counts have decreased"
        world.counted[machine] = total
    assert len(fabric.contexts) == len(world.machines)
    assert sorted(fabric.connections) == sorted(world.watched), "streams known to vsockd"
    for connection in fabric.connections.values():
        local = connection.context.connected.get(connection.local[1])
        assert local is connection, f"the port of {connection.local} has another owner"
        for one in (connection.context, connection.peer_context):
            assert fabric.contexts.get(one.cid) is one, "a stream of a removed context"
    waiting = world.away()
    for channel in world.channels:
        endpoint = channel.endpoint
        if endpoint is not None and channel.is_known and id(channel) not in waiting:
            ports: Any = endpoint.context.connected
            if endpoint.kind is DATAGRAM:
                ports = endpoint.context.datagrams
            assert ports.get(endpoint.port) is endpoint, f"{endpoint.address} lost its port"


def check_parties(world: FabricWorld) -> None:
    """The counts of each party equal what it has."""
    held: Counter[int] = Counter()
    for context in world.fabric.contexts:
        for holder in [*context.connected.values(), *context.datagrams.values()]:
            held[id(holder.party)] += 1
        for party in context.parties():
            assert party.sockets == held[id(party)], (
                f"{party} is counted with {party.sockets} sockets, has {held[id(party)]}"
            )
            pending = sum(
                world.client_party(stream) is party
                for link in world.links
                for stream in link.pending.values()
            )
            assert party.pending == pending, f"{party}: {party.pending} pending, not {pending}"


def check_streams(world: FabricWorld) -> None:
    """No side of a stream was told other addresses than the other side."""
    for stream in world.streams:
        for told, expected in (
            (stream.client_told, (stream.local, stream.peer)),
            (stream.server_told, (stream.peer, stream.local)),
        ):
            assert told is None or told == expected, f"half told: {told}, not {expected}"
    for process in world.processes:
        for stream in process.accepted:
            one = stream.server_machine
            assert stream.is_broken or stream.is_orphan or one is process.machine


def check_addresses(world: FabricWorld) -> None:
    """No port has two owners."""
    owners: set[tuple[int, bool, int]] = set()
    sockets = [
        (one.machine.cid, one.kind is DATAGRAM, one.address[1])
        for one in world.channels
        if one.is_open and one.is_known and one.address and one.stream is None
    ]
    streams = [
        (one.client_machine.cid, False, one.local[1])
        for one in world.streams
        if one.is_alive and one.number in world.watched and one.client.stream is one
    ]
    for owner in sockets + streams:
        assert owner not in owners, f"port owned twice: {owner}"
        owners.add(owner)


def describe(fabric: Fabric) -> dict[Any, Any]:
    """Return all of a fabric as plain values, to compare."""
    found: dict[Any, Any] = {"numbers": (fabric.last_number, fabric.contexts.following)}
    for context in fabric.contexts:
        cid, counts = context.cid, context.counts
        found[cid] = (
            *(context.name, context.owner, context.state, context.fault_tolerant, context.leases),
            *(context.isolation, context.limits, context.reserved_ports, context.hybrid),
            *(counts.connects, counts.accepts, counts.refusals, dict(counts.denials)),
            *(context.connected.following, context.datagrams.following),
            context.device is None,
        )
        for name, ports in (("stream", context.connected), ("datagram", context.datagrams)):
            for port, holder in ports.items():
                found[cid, name, port] = describe_holder(holder)
        for cookie, one in context.cookies.items():
            found[cid, "cookie", cookie] = describe_holder(one)
        for party in context.parties():
            if party.is_in_use:
                found[cid, "party", party.uid] = party.name, party.sockets, party.pending
    for number, connection in fabric.connections.items():
        found["stream", number] = describe_holder(connection)
    return found


def describe_holder(one: Endpoint | Connection) -> Any:
    if isinstance(one, Connection):
        listener = describe_holder(one.listener)
        ends = one.number, one.context.cid, one.local, one.peer, one.size, one.sizes, one.owner
        return ends, one.party.name, one.cookie, listener
    party = one.party.name if one.party is not None else None
    place = one.kind, one.context.cid, one.cid, one.port, one.owner, one.trust, one.cookie
    return place, one.listening, one.pending, one.sizes, party, one.handle
