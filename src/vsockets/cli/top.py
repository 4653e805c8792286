"""``vsock top``: a live view of contexts, streams, rates and denials."""

from __future__ import annotations

import errno
import json
import time
from collections import Counter, deque
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..control import Control, Events
from ..model.text import printable
from .connect import administrator
from .groups import command
from .live_view import View, interval_option, require_terminal, show
from .observation import RISING, Rates, bytes_per_second, fill_queues, with_unit
from .options import json_option
from .output import Column, make_table

if TYPE_CHECKING:
    from rich.console import RenderableType

#: Denials kept for display: more than any terminal has lines.
_DENIALS = 200

#: Sort orders of contexts, by key; in descending order except for the CID.
_ORDERS = {"i": "cid", "s": "streams", "b": "bytes", **{name[0]: name for name in RISING}}

#: Rates omitted where space is short, the last one first.
_SPARE = {"accepts": 2, "refusals": 3, "bytes": 1}

CONTEXT_COLUMNS = (
    Column("CID", right=True),
    Column("NAME", least=8),
    Column("STATE", from_width=80),
    Column("SOCKETS", right=True, from_width=90),
    Column("STREAMS", right=True),
    *(
        Column(f"{name.upper()}/S", right=True, spare=_SPARE.get(name, 0))
        for name in (*RISING, "bytes")
    ),
)
STREAM_COLUMNS = (
    Column("FROM", least=12),
    Column("TO", least=12),
    Column("TYPE", from_width=80),
    Column("STREAMS", right=True),
    Column("RECV-Q", right=True),
    Column("SEND-Q", right=True),
    Column("BYTES/S", right=True),
)


@command("top")
@interval_option(1.0)
@json_option
def top(interval: float, as_json: bool) -> None:
    """Show contexts, streams, rates and denials on the terminal.  Ends on q or Ctrl-C.

    Keys sort the contexts: i by CID, s by streams, c, a, r and d by connects, accepts, refusals
    and denials per second, b by bytes per second.  Bytes are counted by the devices of virtual
    machines and, for its own streams, by vsock forward; the kernel does not count those of other
    streams.  --json prints one object per line.
    """
    if not as_json:
        require_terminal()
    with administrator() as control, control.events("denial") as events:
        if as_json:
            rates = Rates()
            while True:
                counts = control.counts()
                print(json.dumps(_with_rates(counts, rates)), flush=True)
                time.sleep(interval)
        show(_Top(control, events), interval)


def _with_rates(counts: dict[str, Any], rates: Rates) -> dict[str, Any]:
    """Return ``counts`` with the rates of each context, None at the first call."""
    risen = rates.update(counts, time.monotonic())
    for row in counts["contexts"]:
        row["rates"] = risen.get(row["cid"])
    return {"time": round(time.time(), 3), **counts}


class _Top(View):
    def __init__(self, control: Control, events: Events) -> None:
        self.sources = [events.fileno()]
        self._control = control
        self._events = events
        self._rates = Rates()
        self._order = "connects"
        self._denials: deque[dict[str, Any]] = deque(maxlen=_DENIALS)
        self._contexts: list[dict[str, Any]] = []
        self._streams: list[tuple[object, ...]] = []
        self._status: dict[str, Any] = {}

    def update(self) -> None:
        counts = _with_rates(self._control.counts(), self._rates)
        # The hypervisor's context is shown only when it has sockets.
        self._contexts = [row for row in counts["contexts"] if row["cid"] or row["sockets"]]
        self._status = self._control.status()
        self._streams = list(_streams(self._control.sockets()))

    def read_source(self) -> None:
        events = self._events.take()
        if events is None:
            raise OSError(errno.ENODEV, "vsockd has ended")
        self._denials.extend(events)

    def press(self, keys: str) -> None:
        for key in keys:
            self._order = _ORDERS.get(key, self._order)

    def draw(self, width: int, height: int) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        # Two lines of title, and for each of the three parts a title and an empty line.
        room = max(3, height - 7)
        denials = min(len(self._denials), max(1, room // 4))
        contexts = min(len(self._contexts), max(1, (room - denials) // 2))
        streams = max(1, room - denials - contexts)
        rows = sorted(self._contexts, key=self._rank)
        newest = list(islice(reversed(self._denials), denials))
        return Group(
            Text(self._title(), no_wrap=True, overflow="ellipsis"),
            Text(f"sorted by {self._order} (i s c a r d b), q: quit", "dim", no_wrap=True),
            make_table(CONTEXT_COLUMNS, map(context_row, rows[:contexts]), width),
            Text(),
            make_table(STREAM_COLUMNS, self._streams[:streams], width),
            Text(),
            Text("DENIALS, newest first", "bold", no_wrap=True),
            *(Text(_denial(event), no_wrap=True, overflow="ellipsis") for event in newest),
        )

    def _rank(self, row: dict[str, Any]) -> tuple[float, int]:
        if self._order == "cid":
            return 0, row["cid"]
        values = {**(row["rates"] or {}), "streams": row["streams"]}
        values["bytes"] = bytes_per_second(row) or 0
        return -values.get(self._order, 0), row["cid"]

    def _title(self) -> str:
        status = self._status
        sums = Counter[str]()
        for row in self._contexts:
            sums.update(row["rates"] or {})
        rates = ", ".join(f"{sums[name]:.0f} {name}/s" for name in ("connects", "denials"))
        return (
            f"vsockd {status['pid']}, up {status['uptime']:.0f} s: {len(self._contexts)} contexts, "
            f"{status['streams']} streams, {rates}"
        )


def _streams(sockets: list[dict[str, Any]]) -> Iterator[tuple[object, ...]]:
    """Yield a row for each source, destination and type of streams, the most streams first."""
    begun = [row for row in sockets if row["accepted"] is False]
    fill_queues(begun)
    by_route: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for row in begun:
        route = row["cid"], "{}:{}".format(*row["peer"]), row["type"]
        by_route.setdefault(route, []).append(row)
    for (cid, peer, kind), rows in sorted(by_route.items(), key=lambda item: -len(item[1])):
        queues = _sum(rows, "receive_queue"), _sum(rows, "send_queue")
        moved = [rate for row in rows if (rate := bytes_per_second(row)) is not None]
        yield cid, peer, kind, len(rows), *queues, with_unit(sum(moved) if moved else None)


def _sum(rows: list[dict[str, Any]], queue: str) -> object:
    known = [row[queue] for row in rows if row[queue] is not None]
    return sum(known) if known else "-"


def context_row(row: dict[str, Any]) -> tuple[object, ...]:
    """Return the cells of a context, one for each of CONTEXT_COLUMNS."""
    rates = row["rates"]
    risen = [f"{rates[name]:.0f}" if rates else "-" for name in RISING]
    moved = with_unit(bytes_per_second(row))
    return row["cid"], row["name"], row["state"], row["sockets"], row["streams"], *risen, moved


def _denial(event: dict[str, Any]) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    lost = f" ({event['missed']} were lost before)" if event["missed"] else ""
    return printable(
        f"{clock} {event['rule']}: context {event['context']}, pid {event['pid']}, "
        f"{event['operation']}: {event['reason']}{lost}"
    )
