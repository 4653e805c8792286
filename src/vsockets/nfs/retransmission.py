"""Retransmission of calls: timeouts of the client, and duplicate requests at the server.  No I/O.

The client has timeouts (RFC 6298) and a window of calls in flight (AIMD).  The calling code
supplies the time, in seconds of any monotonic clock.

The server's duplicate request cache is Juszczak's remedy (USENIX 1989) for non-idempotent calls
over a transport that loses replies: a retransmitted call gets the cached reply, and is not
performed again, also by a later server process (:mod:`.reply_journal`).  Callers are
distinguished by their vSockets address, which vsockd guarantees.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

from .limits import (
    NFS_CACHED_GUESTS_MAX,
    NFS_CACHED_REPLIES_MAX,
    NFS_CALL_TIMEOUT_SECONDS,
    NFS_CALLS_IN_FLIGHT_MAX,
    NFS_GUEST_CACHED_REPLIES_MAX,
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


#: Leading bytes of a call that identify it among calls with its xid, as in Linux's server.
_DIGEST_BYTES = 256


_Key = tuple[tuple[Any, ...], int, int]


class CachedReply(NamedTuple):
    """A cached reply with the key of its call: source address, xid and digest.

    ``change`` is what the call was about to change, for a server process that finds the call
    interrupted; empty once the call has been performed.
    """

    source: tuple[Any, ...]
    xid: int
    digest: int
    reply: bytes
    change: bytes = b""


class DuplicateRequestCache:
    """The latest replies to each guest, by call.

    Each reply has a *slot*, a number below ``total_max``, under which ``record`` stores it for the
    next server process.  When all slots are in use, the guest with the most replies loses its
    oldest.
    """

    def __init__(
        self,
        record: Callable[[int, CachedReply], None] = lambda slot, reply: None,
        replies_max: int = NFS_GUEST_CACHED_REPLIES_MAX,
        guests_max: int = NFS_CACHED_GUESTS_MAX,
        total_max: int = NFS_CACHED_REPLIES_MAX,
    ) -> None:
        self._record = record
        self._replies_max, self._guests_max = replies_max, guests_max
        self._free = list(range(total_max))
        self._replies: OrderedDict[Hashable, OrderedDict[_Key, tuple[int, bytes]]]
        self._replies = OrderedDict()

    def __len__(self) -> int:
        return sum(len(replies) for replies in self._replies.values())

    def find(self, guest: Hashable, source: tuple[Any, ...], xid: int, call: bytes) -> bytes | None:
        """Return the cached reply to ``call``, or None."""
        replies = self._replies.get(guest)
        found = replies.get((source, xid, _digest(call))) if replies else None
        return found[1] if found is not None else None

    def add(
        self,
        guest: Hashable,
        source: tuple[Any, ...],
        xid: int,
        call: bytes,
        reply: bytes,
        change: bytes = b"",
    ) -> None:
        """Cache and record the reply to ``call``; replace an earlier one."""
        cached = CachedReply(source, xid, _digest(call), reply, change)
        self._record(self._insert(guest, cached, None), cached)

    def restore(self, replies: Iterable[tuple[int, CachedReply]]) -> None:
        """Cache the replies that an earlier server process has recorded, with their slots."""
        replies = list(replies)
        used = {slot for slot, _ in replies}
        self._free = [slot for slot in self._free if slot not in used]
        for slot, reply in replies:
            self._insert(reply.source[0], reply, slot)

    def _insert(self, guest: Hashable, cached: CachedReply, slot: int | None) -> int:
        """Cache a reply, in ``slot`` or the slot of an earlier reply or a free one; return it."""
        replies = self._replies.setdefault(guest, OrderedDict())
        self._replies.move_to_end(guest)
        key = cached[:3]
        earlier = replies.get(key)
        if earlier is not None:
            if slot is not None:
                self._free.append(earlier[0])
            else:
                slot = earlier[0]
        elif slot is None:
            if not self._free:
                largest = max(self._replies.values(), key=len)
                self._evict(largest, max(1, len(largest) // 2))
            slot = self._free.pop()
        replies[key] = slot, cached.reply
        self._evict(replies, len(replies) - self._replies_max)
        if len(self._replies) > self._guests_max:
            _, evicted = self._replies.popitem(last=False)
            self._evict(evicted, len(evicted))
        return slot

    def _evict(self, replies: OrderedDict[_Key, tuple[int, bytes]], number: int) -> None:
        for _ in range(number):
            _, (slot, _) = replies.popitem(last=False)
            self._free.append(slot)


def _digest(call: bytes) -> int:
    """Return the digest of a call's first bytes; they include the offset of a WRITE."""
    return zlib.crc32(call[:_DIGEST_BYTES], len(call))
