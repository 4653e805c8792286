"""What vsockd tells its administrator: plain values, fit for JSON."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..fabric import LIMIT_RULES, Connection, Context, Endpoint, Kind
from .broker import Broker


def status(broker: Broker) -> dict[str, Any]:
    """Counts of everything."""
    broker.refresh()
    fabric = broker.fabric
    return {
        "contexts": sum(context.cid != 0 for context in fabric.contexts),
        "streams": len(fabric.connections),
        "listeners": sum(
            isinstance(holder, Endpoint) and holder.listening
            for context in fabric.contexts
            for holder in context.connected
        ),
        "datagram_sockets": len(broker.datagrams),
        "refusals": broker.refusals,
        "denials": sum(sum(context.denials.values()) for context in fabric.contexts),
        "limits_met": sum(
            context.denials[rule] for context in fabric.contexts for rule in LIMIT_RULES
        ),
        "descriptors": len(os.listdir("/proc/self/fd")) - 1,
    }


def context_row(broker: Broker, context: Context, folder: Path) -> dict[str, Any]:
    """A context: who it is, what it may, what it has.

    The host's and the hypervisor's ``limits`` are None: they have none.
    """
    limits = context.limits
    return {
        "cid": context.cid,
        "name": context.name,
        "owner": context.owner,
        "leased": context.leased,
        "state": context.state.value,
        "ft": context.fault_tolerant,
        "profile": context.isolation.profile.value,
        "unrestricted": context.isolation.unrestricted,
        "domain": context.isolation.domain,
        "folder": str(folder),
        "usage": {
            "sockets": context.sockets,
            "pending_connects": max(context.pending, 0),
            "datagram_bytes": broker.datagrams.queued(context),
        },
        "limits": {
            "sockets": limits.sockets,
            "pending_connects": limits.pending_connects,
            "request_rate": limits.request_rate,
            "datagram_bytes": limits.datagram_bytes,
        }
        if context.is_guest
        else None,
        "denials": {rule.value: number for rule, number in sorted_denials(context)},
    }


def sorted_denials(context: Context) -> list[tuple[Any, int]]:
    """How often each rule was applied to the context, most often first."""
    return context.denials.most_common()


def socket_rows(broker: Broker) -> list[dict[str, Any]]:
    """Every socket: listening and bound ones, datagram sockets, both ends of streams.

    ``pid`` and ``uid`` are those of the process that vsockd dealt with, ``inode`` is the socket's
    where it is known, else 0.
    """
    broker.refresh()
    accepted = broker.streams.accepted()
    rows: list[dict[str, Any]] = []
    for context in broker.fabric.contexts:
        for holder in [*context.connected, *context.datagrams]:
            if isinstance(holder, Connection):
                rows += _stream_rows(holder, accepted.get(holder.number, 0))
            else:
                rows.append(_endpoint_row(holder))
    return sorted(rows, key=lambda row: (row["context"], row["type"], row["port"]))


def _endpoint_row(endpoint: Endpoint) -> dict[str, Any]:
    state = "bound"
    if endpoint.kind is Kind.DATAGRAM:
        state = "unconnected"
    elif endpoint.listening:
        state = "listening"
    return {
        "context": endpoint.context.cid,
        "type": endpoint.kind.value,
        "state": state,
        "cid": endpoint.cid,
        "port": endpoint.port,
        "peer": None,
        "pid": endpoint.owner.pid,
        "uid": endpoint.owner.uid,
        "inode": endpoint.inode,
        "buffer": endpoint.sizes.size,
    }


def _stream_rows(stream: Connection, accepted: int) -> list[dict[str, Any]]:
    sides = (
        (stream.context, stream.local, stream.peer, stream.owner, stream.inode),
        (stream.peer_context, stream.peer, stream.local, stream.listener.owner, accepted),
    )
    return [
        {
            "context": context.cid,
            "type": stream.kind.value,
            "state": "established",
            "cid": local[0],
            "port": local[1],
            "peer": list(peer),
            "pid": owner.pid,
            "uid": owner.uid,
            "inode": inode,
            "buffer": stream.size,
        }
        for context, local, peer, owner, inode in sides
    ]
