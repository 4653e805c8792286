"""A token-bucket rate limiter."""

from __future__ import annotations


class TokenBucket:
    """A bucket for ``rate`` events per second, and bursts of ``rate`` after a quiet second."""

    __slots__ = ("_left", "_seen", "rate")

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self._left = float(rate)
        self._seen = 0.0

    def try_take(self, now: float) -> bool:
        """Take a token at ``now``, in seconds of a monotonic clock; return whether one was left."""
        left = self._left + (now - self._seen) * self.rate
        self._seen = now
        if left > self.rate:
            left = self.rate
        if left < 1:
            self._left = left
            return False
        self._left = left - 1
        return True
