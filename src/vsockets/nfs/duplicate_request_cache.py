"""The duplicate-request cache: what is asked again is answered again, and not done again.

Juszczak's remedy (USENIX 1989) for calls that must not be done twice, over a transport that
loses answers.  Who asks is told apart by his vSockets address, which vsockd vouches for.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, NamedTuple

from .limits import NFS_CACHED_GUESTS_MAX, NFS_GUEST_CACHED_REPLIES_MAX

#: Bytes of a call that tell it from others with its number, as Linux's server has them.
_ENOUGH = 256


class Answer(NamedTuple):
    """What a call was answered: the caller's address, the call's number and digest, the reply."""

    source: tuple[Any, ...]
    xid: int
    digest: int
    reply: bytes


class DuplicateRequestCache:
    """Answers by call; each guest's oldest go first when there are too many of his."""

    def __init__(
        self, most: int = NFS_GUEST_CACHED_REPLIES_MAX, guests: int = NFS_CACHED_GUESTS_MAX
    ) -> None:
        self._most, self._guests = most, guests
        self._answers: OrderedDict[Hashable, OrderedDict[tuple[tuple[Any, ...], int, int], bytes]]
        self._answers = OrderedDict()

    def __len__(self) -> int:
        return sum(len(answers) for answers in self._answers.values())

    def find(self, guest: Hashable, source: tuple[Any, ...], xid: int, call: bytes) -> bytes | None:
        """The answer that this very call got before."""
        answers = self._answers.get(guest)
        return answers.get((source, xid, _digest(call))) if answers else None

    def keep(
        self, guest: Hashable, source: tuple[Any, ...], xid: int, call: bytes, reply: bytes
    ) -> None:
        """Remember an answer."""
        self._enter(guest, source, xid, _digest(call), reply)

    def __iter__(self) -> Iterator[Answer]:
        """All answers, each guest's oldest first."""
        for answers in self._answers.values():
            for (source, xid, digest), reply in answers.items():
                yield Answer(source, xid, digest, reply)

    def restore(self, answers: Iterable[Answer]) -> None:
        """Remember what an earlier life of the server did."""
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
    """Of what is asked, without most of the data: a WRITE has its place in the file there."""
    return zlib.crc32(call[:_ENOUGH], len(call))
