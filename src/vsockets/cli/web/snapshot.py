"""Snapshots for the page: the current contexts and streams as JSON values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..limits import WEB_CONTEXTS_MAX, WEB_STREAMS_MAX
from ..rates import RISING, bytes_per_second
from ..socket_owners import Owner

_Row = Mapping[str, Any]


def make_snapshot(
    status: _Row,
    counts: _Row,
    contexts: Sequence[_Row],
    sockets: Sequence[_Row],
    rates: Mapping[int, Mapping[str, float]],
    find: Callable[[int, int, int | None], Owner],
) -> dict[str, Any]:
    """Combine replies of :class:`vsockets.control.Control` and :class:`..rates.Rates`.

    In the result, ``contexts`` and ``streams`` are the busiest, in the order of their addresses,
    and ``left_out`` counts the others; ``links`` counts streams by pairs of listed contexts.  A
    rate is per second, or null until it is known; ``bytes`` per second are null where no process
    counts them.  ``find`` is
    :meth:`..socket_owners.Owners.find`.
    """
    facts = {row["cid"]: row for row in contexts}
    # The hypervisor's context is shown only when it has sockets.
    rows = [row for row in counts["contexts"] if row["cid"] or row["sockets"]]
    rows.sort(key=lambda row: (row["cid"] > 2, -row["streams"], row["cid"]))
    shown = sorted(rows[:WEB_CONTEXTS_MAX], key=lambda row: row["cid"])
    begun = [row for row in sockets if row["accepted"] is False]
    begun.sort(key=lambda row: (row["context"], row["peer"], row["port"]))
    streams = [
        _stream(row, find(row["pid"], row["uid"], row["inode"])) for row in begun[:WEB_STREAMS_MAX]
    ]
    return {
        "vsockd": {name: status[name] for name in ("pid", "folder", "uptime", "streams")},
        "contexts": [_context(row, facts.get(row["cid"], {}), rates) for row in shown],
        "streams": streams,
        "links": _links(begun, {row["cid"] for row in shown}),
        "rates": {name: sum(row[name] for row in rates.values()) for name in RISING}
        if rates
        else None,
        "left_out": {"contexts": len(rows) - len(shown), "streams": len(begun) - len(streams)},
    }


def _context(row: _Row, facts: _Row, rates: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    return {
        "cid": row["cid"],
        "name": row["name"],
        "state": row["state"],
        "ft": facts.get("ft", False),
        "profile": facts.get("profile", "default"),
        "guest": row["cid"] > 2,
        "sockets": row["sockets"],
        "streams": row["streams"],
        "denials": sum(row["denials"].values()),
        "rates": rates.get(row["cid"]),
        "bytes": bytes_per_second(row),
    }


def _stream(row: _Row, owner: Owner) -> dict[str, Any]:
    return {
        "from": row["context"],
        "to": row["peer"][0],
        "local": [row["cid"], row["port"]],
        "peer": row["peer"],
        "type": row["type"],
        "state": row["state"],
        "pid": owner.pid,
        "command": owner.command,
        "receive_queue": row["receive_queue"],
        "send_queue": row["send_queue"],
        "bytes": bytes_per_second(row),
    }


def _links(begun: Sequence[_Row], shown: set[int]) -> list[dict[str, int]]:
    pairs = Counter((row["context"], row["peer"][0]) for row in begun)
    return [
        {"from": source, "to": target, "streams": number}
        for (source, target), number in sorted(pairs.items())
        if source in shown and target in shown
    ]
