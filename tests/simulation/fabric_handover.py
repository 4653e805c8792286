"""A fabric that goes from one vsockd to the next, by the functions with which vsockd does it."""

from __future__ import annotations

import marshal

from vsockets.daemon.handover import (
    Reader,
    Writer,
    restore_connections,
    restore_endpoint,
    restore_fabric,
    save_connections,
    save_endpoint,
    save_fabric,
)
from vsockets.fabric import Fabric

from .simulated_kernel import SimulatedChannel


def hand_over(old: Fabric, channels: list[SimulatedChannel]) -> Fabric:
    """Return a new fabric with what ``old`` has; ``channels`` get its endpoints.

    Devices are attached by the caller.
    """
    writer = Writer(old)
    for channel in channels:
        writer.endpoint(channel.endpoint)
    connections = save_connections(writer, old.connections.values())
    endpoints = {number: save_endpoint(writer, one) for one, number in writer.endpoints.items()}
    handles = [one.handle for one in writer.endpoints]
    pending = [
        (context.cid, party.uid, party.pending)
        for context in old.contexts
        for party in context.parties()
    ]
    saved = {**save_fabric(old, writer.early), "endpoints": endpoints, "connections": connections}
    saved = marshal.loads(marshal.dumps(saved))
    new = Fabric(old.contexts.host.owner)
    restore_fabric(new, saved)
    reader = Reader(new, [])
    for number, one in saved["endpoints"].items():
        reader.endpoints[number] = restore_endpoint(reader, one)
    for endpoint, handle in zip(reader.endpoints.values(), handles, strict=True):
        endpoint.handle = handle
    for channel, endpoint in zip(channels, reader.endpoints.values(), strict=False):
        channel.endpoint = endpoint
    found = restore_connections(reader, saved["connections"])
    new.connections.update({one.number: one for one in found})
    for cid, uid, number in pending:  # vsockd's own counts, of channels and links
        new.contexts.require(cid).party_of(uid).pending = number
    return new
