"""When a call is sent again, and how many are on their way: RFC 6298's timers, AIMD's window.

No clock of its own: times are seconds of whatever clock the caller has.
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
    """How long answers take; ``wait`` is how long to wait for one, in seconds."""

    def __init__(self) -> None:
        self.wait = NFS_RETRY_FIRST_SECONDS
        self._mean: float | None = None
        self._deviation = 0.0

    def measured(self, seconds: float) -> None:
        """A call that was sent once was answered after ``seconds`` (Karn: only such count)."""
        if self._mean is None:
            self._mean, self._deviation = seconds, seconds / 2
        else:
            self._deviation = 0.75 * self._deviation + 0.25 * abs(self._mean - seconds)
            self._mean = 0.875 * self._mean + 0.125 * seconds
        wait = self._mean + 4 * self._deviation
        self.wait = min(max(wait, NFS_RETRY_MIN_SECONDS), NFS_RETRY_MAX_SECONDS)


class Window:
    """How many calls may be on their way: one more for each round without loss, half after one."""

    def __init__(self, most: int = NFS_CALLS_IN_FLIGHT_MAX) -> None:
        self._most = most
        self._size = most / 2

    @property
    def size(self) -> int:
        """Calls; at least one."""
        return int(self._size)

    def answered(self) -> None:
        """An answer came in time."""
        self._size = min(self._most, self._size + 1 / self._size)

    def lost(self) -> None:
        """One did not."""
        self._size = max(1.0, self._size / 2)


class Transmission:
    """One call on its way: when to send it again, and when to give up."""

    def __init__(self, now: float, wait: float) -> None:
        self.tries = 1
        self.due = now + wait  #: when to send it again
        self._began = self._sent = now
        self._wait = wait

    def again(self, now: float) -> bool:
        """It is due: whether to send it again.  If not, nobody is there."""
        if now - self._began >= NFS_CALL_TIMEOUT_SECONDS:
            return False
        self.tries += 1
        self._sent = now
        self.due = now + min(self._wait * 2 ** (self.tries - 1), NFS_RETRY_MAX_SECONDS)
        return True

    def unsent(self, now: float) -> None:
        """That try did not get away, as a queue here is full."""
        self.tries -= 1
        self.due = now + NFS_QUEUE_FULL_RETRY_SECONDS

    def round_trip(self, now: float) -> float | None:
        """Seconds the answer took; None if it could be that of any of several tries."""
        return now - self._sent if self.tries == 1 else None
