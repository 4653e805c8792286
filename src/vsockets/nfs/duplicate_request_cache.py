"""Duplicate request cache: a retransmitted call gets the cached reply, and is not performed again.

Juszczak's remedy (USENIX 1989) for non-idempotent calls over a transport that loses replies.
Callers are told apart by their vSockets address, which vsockd guarantees.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, NamedTuple

from .limits import NFS_CACHED_GUESTS_MAX, NFS_GUEST_CACHED_REPLIES_MAX

#: Leading bytes of a call that identify it among calls with its xid, as in Linux's server.
_DIGEST_BYTES = 256


class CachedReply(NamedTuple):
    """A cached reply with the key of its call: source address, xid and digest."""

    source: tuple[Any, ...]
    xid: int
    digest: int
    reply: bytes


class DuplicateRequestCache:
    """The latest replies to each guest, by call."""

    def __init__(
        self,
        replies_max: int = NFS_GUEST_CACHED_REPLIES_MAX,
        guests_max: int = NFS_CACHED_GUESTS_MAX,
    ) -> None:
        self._replies_max, self._guests_max = replies_max, guests_max
        self._replies: OrderedDict[Hashable, OrderedDict[tuple[tuple[Any, ...], int, int], bytes]]
        self._replies = OrderedDict()

    def __len__(self) -> int:
        return sum(len(replies) for replies in self._replies.values())

    def find(self, guest: Hashable, source: tuple[Any, ...], xid: int, call: bytes) -> bytes | None:
        """Return the cached reply to ``call``, or None."""
        replies = self._replies.get(guest)
        return replies.get((source, xid, _digest(call))) if replies else None

    def add(
        self, guest: Hashable, source: tuple[Any, ...], xid: int, call: bytes, reply: bytes
    ) -> None:
        """Cache the reply to ``call``."""
        self._insert(guest, source, xid, _digest(call), reply)

    def __iter__(self) -> Iterator[CachedReply]:
        """Iterate over all replies, oldest first for each guest."""
        for replies in self._replies.values():
            for (source, xid, digest), reply in replies.items():
                yield CachedReply(source, xid, digest, reply)

    def restore(self, replies: Iterable[CachedReply]) -> None:
        """Cache the replies that an earlier server process saved."""
        for reply in replies:
            self._insert(reply.source[0], *reply)

    def _insert(
        self, guest: Hashable, source: tuple[Any, ...], xid: int, digest: int, reply: bytes
    ) -> None:
        replies = self._replies.setdefault(guest, OrderedDict())
        self._replies.move_to_end(guest)
        replies[source, xid, digest] = reply
        if len(replies) > self._replies_max:
            replies.popitem(last=False)
        if len(self._replies) > self._guests_max:
            self._replies.popitem(last=False)


def _digest(call: bytes) -> int:
    """Return the digest of a call's first bytes; they include the offset of a WRITE."""
    return zlib.crc32(call[:_DIGEST_BYTES], len(call))
