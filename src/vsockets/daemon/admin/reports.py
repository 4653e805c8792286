"""Reports for the administrator, as plain values for JSON.

A host may have a hundred thousand streams.  So a report is made in steps: an iterator that yields a
row, or None after some work without one, and the session does a few steps per request
(:mod:`.control`).  An item that ends between two steps is left out.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

from ...fabric import LIMIT_RULES, Connection, Context, Counts, Endpoint, EndpointKind
from ...model.rates import ByteMeter
from ..broker import Broker
from ..datagrams import Traffic

Row = dict[str, Any]
#: A report in the making.  It returns a function of the rows that were not sent before, whose
#: result is the answer.
Report = Generator[Row | None, None, Callable[[list[Row]], Any]]

#: Streams counted in one step: some 100 microseconds.
_COUNTED_PER_STEP = 256


def status(broker: Broker) -> Report:
    """Return the totals of contexts, sockets, streams, refusals and denials, as numbers by name."""
    yield from broker.refresh()
    fabric = broker.fabric
    total = Counts()
    total.add(fabric.departed)
    listeners = 0
    for context in list(fabric.contexts):
        total.add(context.counts)
        listeners += sum(
            isinstance(holder, Endpoint) and holder.listening
            for holder in context.connected.values()
        )
        yield None
    totals = {
        "contexts": sum(context.cid != 0 for context in fabric.contexts),
        "streams": len(fabric.connections),
        "listeners": listeners,
        "datagram_sockets": len(broker.datagrams),
        "refusals": total.refusals,
        "denials": sum(total.denials.values()),
        "limits_met": sum(total.denials[rule] for rule in LIMIT_RULES),
        "descriptors": len(os.listdir("/proc/self/fd")) - 1,
    }
    return lambda _: totals


def counts(broker: Broker) -> Report:
    """Report each context's sockets and streams, and its counters since it was added."""
    yield from broker.refresh()
    streams: Counter[Context] = Counter()
    for number, stream in enumerate(list(broker.fabric.connections.values())):
        streams.update({stream.context, stream.peer_context})
        if number % _COUNTED_PER_STEP == 0:
            yield None
    for context in by_cid(broker):
        yield {
            "cid": context.cid,
            "name": context.name,
            "leased": context.leased,
            "state": context.state.value,
            "sockets": context.sockets,
            "streams": streams[context],
            **_bytes(context.meter),
            **_counted(context.counts),
        }
    departed = _counted(broker.fabric.departed)
    return lambda rows: {"contexts": rows, "departed": departed}


def by_cid(broker: Broker) -> list[Context]:
    """Return the contexts at this moment, in the order of their CIDs."""
    return sorted(broker.fabric.contexts, key=lambda context: context.cid)


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


def context_row(broker: Broker, context: Context, folder: Path) -> Row:
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


def socket_rows(broker: Broker) -> Report:
    """Report every socket: bound and listening ones, datagram sockets, both ends of streams.

    ``pid`` and ``uid`` are those of the process that sent the request to vsockd.  Streams have no
    queue sizes here, but the inodes to ask the kernel for them.
    """
    yield from broker.refresh()
    inodes = broker.streams.inodes()
    traffic = broker.datagrams.traffic()
    yield None
    for context in by_cid(broker):
        for sockets in (context.connected, context.datagrams):
            for key, holder in list(sockets.items()):
                if sockets.get(key) is not holder:
                    continue  # closed since the last step
                if isinstance(holder, Connection):
                    yield from _stream_rows(holder, inodes.get(holder.number))
                else:
                    yield _endpoint_row(holder, traffic)
    return list


def _endpoint_row(endpoint: Endpoint, traffic: Traffic) -> Row:
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
