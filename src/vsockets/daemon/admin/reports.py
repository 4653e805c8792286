"""Reports for the administrator, as plain values for JSON."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...fabric import LIMIT_RULES, Connection, Context, Counts, Endpoint, EndpointKind
from ...model.byte_meter import ByteMeter
from ..broker import Broker
from ..datagrams import Traffic


def status(broker: Broker) -> dict[str, Any]:
    """Return the totals of contexts, sockets, streams, refusals and denials, as numbers by name."""
    broker.refresh()
    fabric = broker.fabric
    total = Counts()
    total.add(fabric.departed)
    for context in fabric.contexts:
        total.add(context.counts)
    return {
        "contexts": sum(context.cid != 0 for context in fabric.contexts),
        "streams": len(fabric.connections),
        "listeners": sum(
            isinstance(holder, Endpoint) and holder.listening
            for context in fabric.contexts
            for holder in context.connected.values()
        ),
        "datagram_sockets": len(broker.datagrams),
        "refusals": total.refusals,
        "denials": sum(total.denials.values()),
        "limits_met": sum(total.denials[rule] for rule in LIMIT_RULES),
        "descriptors": len(os.listdir("/proc/self/fd")) - 1,
    }


def counts(broker: Broker) -> dict[str, Any]:
    """Return each context's sockets and streams, and its counters since it was added."""
    broker.refresh()
    streams: Counter[Context] = Counter()
    for stream in broker.fabric.connections.values():
        streams.update({stream.context, stream.peer_context})
    return {
        "contexts": [
            {
                "cid": context.cid,
                "name": context.name,
                "leased": context.leased,
                "state": context.state.value,
                "sockets": context.sockets,
                "streams": streams[context],
                **_bytes(context.meter),
                **_counted(context.counts),
            }
            for context in sorted(broker.fabric.contexts, key=lambda context: context.cid)
        ],
        "departed": _counted(broker.fabric.departed),
    }


def _bytes(meter: ByteMeter | None, is_other_end: bool = False) -> dict[str, Any]:
    """Return bytes and bytes per second; None where no process reports them."""
    if meter is None:
        return dict.fromkeys(("bytes_sent", "bytes_received", "send_rate", "receive_rate"))
    total, rates = meter.total, meter.rates(time.monotonic())
    if is_other_end:
        total, rates = total.reversed(), rates.reversed()
    return {
        "bytes_sent": total.sent,
        "bytes_received": total.received,
        "send_rate": round(rates.sent, 1),
        "receive_rate": round(rates.received, 1),
    }


def _counted(counts: Counts) -> dict[str, Any]:
    return {
        "connects": counts.connects,
        "accepts": counts.accepts,
        "refusals": counts.refusals,
        "denials": {rule.value: number for rule, number in counts.denials.most_common()},
    }


def context_row(broker: Broker, context: Context, folder: Path) -> dict[str, Any]:
    """Return a context's identity, rights and usage.

    ``limits`` is null for the host and the hypervisor, which are not limited.
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
        "hybrid": context.hybrid,
        "reserved_ports": context.reserved_ports,
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
        "denials": _counted(context.counts)["denials"],
    }


def streams_left(broker: Broker, streams: Iterable[Connection]) -> list[dict[str, Any]]:
    """Return rows for streams that could not be disconnected yet.

    A row has the stream's two addresses, the process that opened it, and the reason.
    """
    return [
        {
            "local": one.local,
            "peer": one.peer,
            "pid": one.owner.pid,
            "reason": broker.streams.disconnect_problem(one),
        }
        for one in streams
    ]


def socket_rows(broker: Broker) -> list[dict[str, Any]]:
    """Return every socket: bound and listening ones, datagram sockets, both ends of streams.

    ``pid`` and ``uid`` are those of the process that sent the request to vsockd.  Streams have no
    queue sizes here, but the inodes to ask the kernel for them.
    """
    broker.refresh()
    inodes = broker.streams.inodes()
    traffic = broker.datagrams.traffic()
    rows: list[dict[str, Any]] = []
    for context in broker.fabric.contexts:
        for holder in [*context.connected.values(), *context.datagrams.values()]:
            if isinstance(holder, Connection):
                rows += _stream_rows(holder, inodes.get(holder.number))
            else:
                rows.append(_endpoint_row(holder, traffic))
    return sorted(rows, key=lambda row: (row["context"], row["type"], row["port"]))


def _endpoint_row(endpoint: Endpoint, traffic: Traffic) -> dict[str, Any]:
    state = "bound"
    receive = send = 0
    if endpoint.kind is EndpointKind.DATAGRAM:
        state = "unconnected"
        receive, send = traffic.by_receiver[endpoint.address], traffic.by_sender[endpoint.address]
    elif endpoint.listening:
        state = "listening"
        receive, send = endpoint.handle.backlog
    return {
        "context": endpoint.context.cid,
        "type": endpoint.kind.value,
        "state": state,
        "cid": endpoint.cid,
        "port": endpoint.port,
        "peer": None,
        "accepted": None,
        "pid": endpoint.owner.pid,
        "uid": endpoint.owner.uid,
        "buffer": endpoint.sizes.size,
        "receive_queue": receive,
        "send_queue": send,
        "inode": endpoint.inode or None,
        "peer_inode": None,
        **_bytes(None),
    }


def _stream_rows(stream: Connection, inode: int | None) -> list[dict[str, Any]]:
    """Return a row for each end of a stream; ``inode`` is the accepting end's."""
    listener = stream.listener
    sides = (
        (stream.context, stream.local, stream.peer, stream.owner, None, inode),
        (stream.peer_context, stream.peer, stream.local, listener.owner, inode, None),
    )
    return [
        {
            "context": context.cid,
            "type": stream.kind.value,
            "state": "connecting" if listener.pending else "established",
            "cid": local[0],
            "port": local[1],
            "peer": list(peer),
            "accepted": bool(accepted),
            "pid": owner.pid,
            "uid": owner.uid,
            "buffer": stream.size,
            "receive_queue": None,
            "send_queue": None,
            "inode": own,
            "peer_inode": other,
            **_bytes(stream.meter, is_other_end=bool(accepted)),
        }
        for accepted, (context, local, peer, owner, own, other) in enumerate(sides)
    ]
