"""From what vsockd has counted to how fast it rises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: What there is a rate of, in a row of :meth:`vsockets.control.Control.counts`.
RISING = ("connects", "accepts", "refusals", "denials")


class Rates:
    """Differences between one answer of :meth:`vsockets.control.Control.counts` and the next."""

    def __init__(self) -> None:
        self._before: dict[int, dict[str, int]] = {}
        self._when: float | None = None

    def update(self, counts: Mapping[str, Any], now: float) -> dict[int, dict[str, float]]:
        """The rates of each context, a second, since the last call; none with the first.

        ``now`` is in seconds of a clock that only rises.
        """
        rows = {row["cid"]: totals(row) for row in counts["contexts"]}
        rates: dict[int, dict[str, float]] = {}
        if self._when is not None and now > self._when:
            seconds = now - self._when
            rates = {
                cid: {name: _risen(row, self._before.get(cid), name) / seconds for name in RISING}
                for cid, row in rows.items()
            }
        self._before, self._when = rows, now
        return rates


def totals(row: Mapping[str, Any]) -> dict[str, int]:
    """What only rises in ``row``, with denials of all rules together."""
    return {**{name: row[name] for name in RISING}, "denials": sum(row["denials"].values())}


def _risen(row: dict[str, int], before: dict[str, int] | None, name: str) -> int:
    if before is None or row[name] < before[name]:  # it is another context, of the same CID
        return row[name]
    return row[name] - before[name]
