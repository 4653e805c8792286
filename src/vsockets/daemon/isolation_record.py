"""Remember which guests are isolated, so that a crash of vsockd makes none of them less so.

Guests that were added while vsockd ran are forgotten with it.  If the next one with such a CID
says nothing of a profile, it is ``restricted`` as the one before.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..fabric import Context, Isolation, Profile

_RESTRICTED = Isolation(Profile.RESTRICTED)


class IsolatedGuests:
    """The CIDs in ``file``: those of earlier vsockds, and those of now."""

    def __init__(self, file: Path) -> None:
        self._file = file
        #: CIDs of guests that were restricted when vsockd crashed
        self.before: set[int] = set()
        try:
            self._written = file.read_text()
            self.before = {int(word) for word in self._written.split() if word.isdecimal()}
        except FileNotFoundError:
            self._written = ""

    def isolation(self, cid: int) -> Isolation:
        """Return the isolation of a new guest that says nothing of it."""
        return _RESTRICTED if cid in self.before else Isolation()

    def record(self, contexts: Iterable[Context]) -> None:
        """Write down who is isolated now.  OSError."""
        now = {context.cid for context in contexts if context.isolation == _RESTRICTED}
        text = "\n".join(map(str, sorted(now | self.before)))
        if text != self._written:
            new = self._file.with_suffix(".new")
            new.write_text(text)
            new.replace(self._file)
            self._written = text
