"""Pauses between attempts of an operation that fails temporarily."""

from __future__ import annotations

from time import monotonic

from ..limits import RETRY_FIRST_PAUSE_SECONDS, RETRY_LONGEST_PAUSE_SECONDS


class Backoff:
    """The pauses between repeated attempts, doubled from ``first`` to ``longest`` seconds.

    With ``jitter`` a pause is a random time between half of the doubled value and all of it, so
    that clients that failed at the same time do not retry at the same time.
    """

    def __init__(
        self,
        first: float = RETRY_FIRST_PAUSE_SECONDS,
        longest: float = RETRY_LONGEST_PAUSE_SECONDS,
        *,
        jitter: bool = False,
    ) -> None:
        self._first = first
        self._longest = longest
        self._jitter = jitter
        self.reset()

    def reset(self) -> None:
        """Begin again with the first pause; the caller calls it after a success."""
        self._pause = self._first
        self._begin = monotonic()

    def permits(self, seconds: float) -> bool:
        """Return whether the next attempt would begin within ``seconds`` of the first one."""
        return monotonic() + self._pause <= self._begin + seconds

    def next_pause(self) -> float:
        """Return the seconds to wait before the next attempt."""
        pause = self._pause
        self._pause = min(pause * 2, self._longest)
        if self._jitter:
            from random import uniform  # here, because few programs need it

            return uniform(pause / 2, pause)
        return pause
