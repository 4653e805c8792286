"""Retransmission timeouts (RFC 6298) and the window of calls in flight (AIMD).

The caller supplies the time, in seconds of a clock of its choice.
"""

from __future__ import annotations

from .limits import (
    NFS_CALL_TIMEOUT_SECONDS,
    NFS_CALLS_IN_FLIGHT_MAX,
    NFS_QUEUE_FULL_RETRY_SECONDS,
    NFS_RETRY_FIRST_SECONDS,
    NFS_RETRY_MAX_SECONDS,
    NFS_RETRY_MIN_SECONDS,
)


class RoundTripEstimator:
    """An estimator of round-trip times; ``timeout`` is the retransmission timeout in seconds."""

    def __init__(self) -> None:
        self.timeout = NFS_RETRY_FIRST_SECONDS
        self._mean: float | None = None
        self._deviation = 0.0

    def add_sample(self, seconds: float) -> None:
        """Add the round-trip time of a call that was sent only once (Karn's algorithm)."""
        if self._mean is None:
            self._mean, self._deviation = seconds, seconds / 2
        else:
            self._deviation = 0.75 * self._deviation + 0.25 * abs(self._mean - seconds)
            self._mean = 0.875 * self._mean + 0.125 * seconds
        wait = self._mean + 4 * self._deviation
        self.timeout = min(max(wait, NFS_RETRY_MIN_SECONDS), NFS_RETRY_MAX_SECONDS)


class Window:
    """The limit of calls in flight: one more per round without loss, half after a loss."""

    def __init__(self, limit: int = NFS_CALLS_IN_FLIGHT_MAX) -> None:
        self._limit = limit
        self._size = limit / 2

    @property
    def size(self) -> int:
        """The number of calls that may be in flight, at least one."""
        return int(self._size)

    def on_reply(self) -> None:
        """Enlarge the window after a reply in time."""
        self._size = min(self._limit, self._size + 1 / self._size)

    def on_loss(self) -> None:
        """Halve the window after a loss."""
        self._size = max(1.0, self._size / 2)


class Transmission:
    """The schedule of one call: when to retransmit it, and when to give up."""

    def __init__(self, now: float, wait: float) -> None:
        self.attempts = 1
        self.due = now + wait  #: when to retransmit it
        self._first_sent = self._last_sent = now
        self._wait = wait

    def retry(self, now: float) -> bool:
        """Schedule the next timeout; return True if the caller is to retransmit the call.

        Returns False if the time for the call is over.
        """
        if now - self._first_sent >= NFS_CALL_TIMEOUT_SECONDS:
            return False
        self.attempts += 1
        self._last_sent = now
        self.due = now + min(self._wait * 2 ** (self.attempts - 1), NFS_RETRY_MAX_SECONDS)
        return True

    def revert_attempt(self, now: float) -> None:
        """Revert an attempt that was not sent because a local queue is full."""
        self.attempts -= 1
        self.due = now + NFS_QUEUE_FULL_RETRY_SECONDS

    def round_trip(self, now: float) -> float | None:
        """Return the round-trip time in seconds; None if a retransmission makes it ambiguous."""
        return now - self._last_sent if self.attempts == 1 else None
