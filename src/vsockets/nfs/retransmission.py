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


class RoundTrips:
    """An estimator of round-trip times; ``wait`` is the retransmission timeout in seconds."""

    def __init__(self) -> None:
        self.wait = NFS_RETRY_FIRST_SECONDS
        self._mean: float | None = None
        self._deviation = 0.0

    def measured(self, seconds: float) -> None:
        """Add the round-trip time of a call that was sent once (Karn excludes the others)."""
        if self._mean is None:
            self._mean, self._deviation = seconds, seconds / 2
        else:
            self._deviation = 0.75 * self._deviation + 0.25 * abs(self._mean - seconds)
            self._mean = 0.875 * self._mean + 0.125 * seconds
        wait = self._mean + 4 * self._deviation
        self.wait = min(max(wait, NFS_RETRY_MIN_SECONDS), NFS_RETRY_MAX_SECONDS)


class Window:
    """The limit of calls in flight: one more per round without loss, half after a loss."""

    def __init__(self, most: int = NFS_CALLS_IN_FLIGHT_MAX) -> None:
        self._most = most
        self._size = most / 2

    @property
    def size(self) -> int:
        """Return the window in calls, at least one."""
        return int(self._size)

    def answered(self) -> None:
        """Enlarge the window after a reply in time."""
        self._size = min(self._most, self._size + 1 / self._size)

    def lost(self) -> None:
        """Halve the window after a loss."""
        self._size = max(1.0, self._size / 2)


class Transmission:
    """The schedule of one call: when to retransmit it, and when to give up."""

    def __init__(self, now: float, wait: float) -> None:
        self.tries = 1
        self.due = now + wait  #: when to send it again
        self._began = self._sent = now
        self._wait = wait

    def again(self, now: float) -> bool:
        """Schedule the next timeout and return whether to retransmit.

        Returns False if the call has timed out for good.
        """
        if now - self._began >= NFS_CALL_TIMEOUT_SECONDS:
            return False
        self.tries += 1
        self._sent = now
        self.due = now + min(self._wait * 2 ** (self.tries - 1), NFS_RETRY_MAX_SECONDS)
        return True

    def unsent(self, now: float) -> None:
        """Revert an attempt that was not sent because a local queue is full."""
        self.tries -= 1
        self.due = now + NFS_QUEUE_FULL_RETRY_SECONDS

    def round_trip(self, now: float) -> float | None:
        """Return the round-trip time in seconds; None if a retransmission makes it ambiguous."""
        return now - self._sent if self.tries == 1 else None
