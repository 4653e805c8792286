"""A token-bucket rate limiter."""

from __future__ import annotations


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
