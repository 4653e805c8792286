"""The duplicate-request cache: what is asked again is answered again, and not done again.

Juszczak's remedy (USENIX 1989) for calls that must not be done twice, over a transport that
loses answers.  Who asks is told apart by his vSockets address, which vsockd vouches for.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Hashable

from .limits import NFS_DUPLICATES, NFS_GUEST_DUPLICATES

#: Bytes of a call that tell it from others with its number, as Linux's server has them.
_ENOUGH = 256


class Duplicates:
    """Answers by call; each guest's oldest go first when there are too many of his."""

    def __init__(self, most: int = NFS_GUEST_DUPLICATES, guests: int = NFS_DUPLICATES) -> None:
        self._most, self._guests = most, guests
        self._answers: OrderedDict[Hashable, OrderedDict[tuple[Hashable, int, int], bytes]]
        self._answers = OrderedDict()

    def __len__(self) -> int:
        return sum(len(answers) for answers in self._answers.values())

    def find(self, guest: Hashable, source: Hashable, xid: int, call: bytes) -> bytes | None:
        """The answer that this very call got before."""
        answers = self._answers.get(guest)
        return answers.get((source, xid, _digest(call))) if answers else None

    def keep(self, guest: Hashable, source: Hashable, xid: int, call: bytes, reply: bytes) -> None:
        """Remember an answer."""
        answers = self._answers.setdefault(guest, OrderedDict())
        self._answers.move_to_end(guest)
        answers[source, xid, _digest(call)] = reply
        if len(answers) > self._most:
            answers.popitem(last=False)
        if len(self._answers) > self._guests:
            self._answers.popitem(last=False)


def _digest(call: bytes) -> int:
    """Of what is asked, without most of the data: a WRITE has its place in the file there."""
    return zlib.crc32(call[:_ENOUGH], len(call))
