"""Rates per second, computed from vsockd's counters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Counters with a rate, in a row of :meth:`vsockets.control.Control.counts`.
RISING = ("connects", "accepts", "refusals", "denials")


_UNITS = ("", "k", "M", "G", "T")


def bytes_per_second(row: Mapping[str, Any]) -> float | None:
    """Return the bytes per second in both directions of a row; None if no process counts them."""
    if row["send_rate"] is None:
        return None
    return float(row["send_rate"] + row["receive_rate"])


def with_unit(number: float | None) -> str:
    """Return ``number`` in at most four characters, such as ``1.2M``; ``-`` for None."""
    if number is None:
        return "-"
    unit = 0
    while number >= 999.5 and unit < len(_UNITS) - 1:
        number /= 1000
        unit += 1
    digits = 1 if unit and number < 9.95 else 0
    return f"{number:.{digits}f}{_UNITS[unit]}"


class Rates:
    """Differences between successive results of :meth:`vsockets.control.Control.counts`."""

    def __init__(self) -> None:
        self._before: dict[int, dict[str, int]] = {}
        self._when: float | None = None

    def update(self, counts: Mapping[str, Any], now: float) -> dict[int, dict[str, float]]:
        """Return each context's rates per second since the last call; empty at the first call.

        ``now`` is a monotonic time in seconds.
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
    """Return the counters of ``row``, with the denials of all rules added up."""
    return {**{name: row[name] for name in RISING}, "denials": sum(row["denials"].values())}


def _risen(row: dict[str, int], before: dict[str, int] | None, name: str) -> int:
    if before is None or row[name] < before[name]:  # a new context with the same CID
        return row[name]
    return row[name] - before[name]
