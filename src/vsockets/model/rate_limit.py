"""How often somebody may."""

from __future__ import annotations


class TokenBucket:
    """Allows ``rate`` events a second, and as many at once after a quiet second."""

    __slots__ = ("_left", "_seen", "rate")

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self._left = float(rate)
        self._seen = 0.0

    def take(self, now: float) -> bool:
        """Whether one more event is allowed at ``now``, in seconds of a clock that only rises."""
        left = self._left + (now - self._seen) * self.rate
        self._seen = now
        if left > self.rate:
            left = self.rate
        if left < 1:
            self._left = left
            return False
        self._left = left - 1
        return True
