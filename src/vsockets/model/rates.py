"""Rates: a limit of events per second; bytes that a process moves in a stream, and their rates.

Streams between two programs are not counted: their bytes pass through the kernel alone, which does
not count them.  Devices and forwarders move the bytes themselves, and report totals to vsockd.
"""

from __future__ import annotations

from typing import NamedTuple

#: Interval of reports while bytes move, in seconds.
REPORT_SECONDS = 1.0

#: Time without a report after which nothing moves, in seconds: a report may be late.
_STALE_SECONDS = 2.5 * REPORT_SECONDS


class TokenBucket:
    """A limit of ``rate`` events per second, and of as many at once after a pause."""

    __slots__ = ("_left", "_seen", "rate")

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self._left = float(rate)
        self._seen = 0.0

    def try_take(self, now: float) -> bool:
        """Take a token at the time ``now`` if one is left; return whether the event is permitted.

        ``now`` is in seconds of a monotonic clock.
        """
        left = self._left + (now - self._seen) * self.rate
        self._seen = now
        if left > self.rate:
            left = self.rate
        if left < 1:
            self._left = left
            return False
        self._left = left - 1
        return True


class Moved(NamedTuple):
    """Bytes, or bytes per second, that one end of a stream has sent and received."""

    sent: float
    received: float

    def plus(self, sent: float, received: float) -> Moved:
        """Return the sums of these and other numbers of bytes."""
        return Moved(self.sent + sent, self.received + received)

    def reversed(self) -> Moved:
        """Return these numbers from the view of the stream's other end."""
        return Moved(self.received, self.sent)


class ByteMeter:
    """The reported bytes of one end of a stream: totals and rates."""

    __slots__ = ("_at", "_rates", "total")

    def __init__(self, sent: float = 0, received: float = 0) -> None:
        """Start with the totals that were reported before."""
        self.total = Moved(sent, received)
        self._rates = Moved(0.0, 0.0)
        self._at: float | None = None

    def report(self, total: Moved, now: float) -> Moved:
        """Replace the totals, which never decrease; return by how much they have increased.

        ``now`` is a monotonic time in seconds.
        """
        more = Moved(*(max(0, new - old) for new, old in zip(total, self.total, strict=True)))
        # Bytes that moved after a pause moved within the last interval.
        since = REPORT_SECONDS if self._at is None else now - self._at
        seconds = min(max(since, REPORT_SECONDS), _STALE_SECONDS)
        self._rates = Moved(more.sent / seconds, more.received / seconds)
        self._at = now
        self.total = self.total.plus(*more)
        return more

    def rates(self, now: float) -> Moved:
        """Return the bytes per second of the last interval."""
        is_stale = self._at is None or now - self._at > _STALE_SECONDS
        return Moved(0.0, 0.0) if is_stale else self._rates
