"""Snapshots of vsockd for all open pages, taken only while a page is open."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

from ...control import Control
from ...guestrpc.client import claims_of_guests
from ...model.text import all_printable
from ..connect import administrator
from ..limits import WEB_CONTEXTS_MAX, WEB_EVENTS_MAX, WEB_STREAMS_MAX
from ..observation import RISING, Owner, Owners, Rates, bytes_per_second, fill_queues

#: Seconds between two attempts to connect to a vsockd that has ended.
_RECONNECT_PAUSE = 1.0


class Watcher:
    """The latest snapshot and the latest events, for any number of pages."""

    def __init__(self, interval: float) -> None:
        """Prepare to take a snapshot every ``interval`` seconds in :meth:`run`."""
        self._interval = interval
        self._control: Control | None = None
        self._rates = Rates()
        self._changed = asyncio.Condition()
        self._number = 0  #: of snapshots taken
        self._snapshot: dict[str, Any] = {}
        self._events: deque[tuple[int, dict[str, Any]]] = deque(maxlen=WEB_EVENTS_MAX)
        self._event_count = 0
        self._watchers = 0
        self._wanted = asyncio.Event()  #: set while there are watchers

    # For the pages

    async def messages(self, after: int | None) -> AsyncIterator[bytes]:
        """Yield server-sent events: ``snapshot``, and ``event`` with its number as id.

        ``after`` is the last id that a reconnecting page has received.  A slow page misses
        snapshots, then events: a gap in the ids shows it.
        """
        seen, shown = after or 0, -1
        if seen > self._event_count:
            seen = 0  # the page was connected to another vsock web
        with self._watched():
            while True:
                async with self._changed:
                    while self._number == shown and self._event_count == seen:
                        await self._changed.wait()
                    events = [event for event in self._events if event[0] > seen]
                    seen = self._event_count
                    news = self._snapshot if self._number != shown else None
                    shown = self._number
                for number, event in events:
                    yield encode_event("event", event, number)
                if news:
                    yield encode_event("snapshot", news)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        self._watchers += 1
        self._wanted.set()
        try:
            yield
        finally:
            self._watchers -= 1
            if not self._watchers:
                self._wanted.clear()
                self._snapshot = {}  # outdated when the next page opens

    # From vsockd

    async def run(self) -> None:
        """Poll vsockd and follow its events until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow())
            group.create_task(self._poll())

    async def _poll(self) -> None:
        while True:
            await self._wanted.wait()
            try:
                seen = await asyncio.to_thread(self._take_snapshot)
            except OSError as error:
                self._disconnect()
                seen = {"unreachable": error.strerror or str(error)}
            async with self._changed:
                self._snapshot = seen
                self._number += 1
                self._changed.notify_all()
            await asyncio.sleep(self._interval)

    def _take_snapshot(self) -> dict[str, Any]:
        if self._control is None:
            self._control = administrator()
        control = self._control
        counts, sockets = control.counts(), control.sockets()
        fill_queues(sockets)
        rates = self._rates.update(counts, time.monotonic())
        find = Owners().find
        claims = claims_of_guests(control.folder)
        contexts = [{**row, "tools": claims.get(row["cid"], "")} for row in control.contexts()]
        return make_snapshot(control.status(), counts, contexts, sockets, rates, find)

    def _disconnect(self) -> None:
        if self._control is not None:
            self._control.close()
        self._control, self._rates = None, Rates()

    async def _follow(self) -> None:
        ended = False
        while True:
            with contextlib.suppress(OSError):
                control = await asyncio.to_thread(administrator)
                with control, await asyncio.to_thread(control.events) as events:
                    if ended:
                        await self._publish(_about_vsockd("vsockd is back"))
                    async for event in events:
                        await self._publish(event)
                ended = True
                await self._publish(_about_vsockd("vsockd has ended"))
            await asyncio.sleep(_RECONNECT_PAUSE)

    async def _publish(self, event: dict[str, Any]) -> None:
        async with self._changed:
            self._event_count += 1
            self._events.append((self._event_count, event))
            self._changed.notify_all()


def _about_vsockd(message: str) -> dict[str, Any]:
    return {"topic": "vsockd", "time": time.time(), "message": message}


def encode_event(kind: str, data: dict[str, Any], number: int | None = None) -> bytes:
    """Return a server-sent event with JSON data, and with ``number`` as its id."""
    name = "" if number is None else f"id: {number}\n"
    return f"event: {kind}\n{name}data: {json.dumps(all_printable(data))}\n\n".encode()


_Row = Mapping[str, Any]


def make_snapshot(
    status: _Row,
    counts: _Row,
    contexts: Sequence[_Row],
    sockets: Sequence[_Row],
    rates: Mapping[int, Mapping[str, float]],
    find: Callable[[int, int, int | None], Owner],
) -> dict[str, Any]:
    """Combine replies of :class:`vsockets.control.Control` and :class:`.Rates`.

    In the result, ``contexts`` and ``streams`` are the busiest, in the order of their addresses,
    and ``left_out`` counts the others; ``links`` counts streams by pairs of listed contexts.  A
    rate is per second, or null until it is known; ``bytes`` per second are null where no process
    counts them.  ``find`` is
    :meth:`.Owners.find`.
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
        "tools": facts.get("tools", ""),
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
