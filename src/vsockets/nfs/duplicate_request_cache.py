"""Duplicate request cache: a retransmitted call gets its first reply again and is not repeated.

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
_ENOUGH = 256


class Answer(NamedTuple):
    """A cached reply with the key of its call: source address, xid and digest."""

    source: tuple[Any, ...]
    xid: int
    digest: int
    reply: bytes


class DuplicateRequestCache:
    """Replies by call.  Above the limit of a guest, its oldest reply is dropped."""

    def __init__(
        self, most: int = NFS_GUEST_CACHED_REPLIES_MAX, guests: int = NFS_CACHED_GUESTS_MAX
    ) -> None:
        self._most, self._guests = most, guests
        self._answers: OrderedDict[Hashable, OrderedDict[tuple[tuple[Any, ...], int, int], bytes]]
        self._answers = OrderedDict()

    def __len__(self) -> int:
        return sum(len(answers) for answers in self._answers.values())

    def find(self, guest: Hashable, source: tuple[Any, ...], xid: int, call: bytes) -> bytes | None:
        """Return the reply that this call got before, or None."""
        answers = self._answers.get(guest)
        return answers.get((source, xid, _digest(call))) if answers else None

    def keep(
        self, guest: Hashable, source: tuple[Any, ...], xid: int, call: bytes, reply: bytes
    ) -> None:
        """Cache a reply."""
        self._enter(guest, source, xid, _digest(call), reply)

    def __iter__(self) -> Iterator[Answer]:
        """Iterate over all replies, oldest first for each guest."""
        for answers in self._answers.values():
            for (source, xid, digest), reply in answers.items():
                yield Answer(source, xid, digest, reply)

    def restore(self, answers: Iterable[Answer]) -> None:
        """Cache the replies that an earlier server process saved."""
        for answer in answers:
            self._enter(answer.source[0], *answer)

    def _enter(
        self, guest: Hashable, source: tuple[Any, ...], xid: int, digest: int, reply: bytes
    ) -> None:
        answers = self._answers.setdefault(guest, OrderedDict())
        self._answers.move_to_end(guest)
        answers[source, xid, digest] = reply
        if len(answers) > self._most:
            answers.popitem(last=False)
        if len(self._answers) > self._guests:
            self._answers.popitem(last=False)


def _digest(call: bytes) -> int:
    """Return the digest of a call's first bytes; they include the offset of a WRITE."""
    return zlib.crc32(call[:_ENOUGH], len(call))
