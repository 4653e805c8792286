"""Pauses between attempts to do something that fails for now."""

from __future__ import annotations

import math
from time import monotonic

from ..limits import RETRY_FIRST_PAUSE_SECONDS, RETRY_LONGEST_PAUSE_SECONDS


class Backoff:
    """The pauses between repeated attempts, doubled from ``first`` to ``longest`` seconds.

    With ``jitter`` a pause is drawn from its upper half, so that clients which failed at the same
    time do not repeat at the same time.
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
        """Start over, after a success: the next pause is the first, the time is counted again."""
        self._pause = self._first
        self._begin = monotonic()

    def next_pause(self, seconds: float = math.inf) -> float | None:
        """Return the seconds to wait before the next attempt.

        Returns None when that attempt would begin more than ``seconds`` after the first one.
        """
        pause = self._pause
        if monotonic() + pause > self._begin + seconds:
            return None
        self._pause = min(pause * 2, self._longest)
        if self._jitter:
            from random import uniform  # here, because few programs need it

            return uniform(pause / 2, pause)
        return pause
