"""Record which guests are isolated, so that a crash of vsockd does not weaken their isolation.

Guests that were added at run time are lost in a crash.  If the next guest with such a CID is added
without a profile, it is ``restricted`` as the previous one was.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..fabric import Context, Isolation, Profile

_RESTRICTED = Isolation(Profile.RESTRICTED)


class IsolatedGuests:
    """The CIDs recorded in ``file``, by this vsockd and those before it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        #: CIDs of guests that were restricted when an earlier vsockd crashed
        self.before: set[int] = set()
        try:
            self._written = file.read_text()
            self.before = {int(word) for word in self._written.split() if word.isdecimal()}
        except FileNotFoundError:
            self._written = ""

    def isolation(self, cid: int) -> Isolation:
        """Return the isolation of a new guest that is added without a profile."""
        return _RESTRICTED if cid in self.before else Isolation()

    def record(self, contexts: Iterable[Context]) -> None:
        """Record the guests that are isolated now.  Raises OSError."""
        now = {context.cid for context in contexts if context.isolation == _RESTRICTED}
        text = "\n".join(map(str, sorted(now | self.before)))
        if text != self._written:
            new = self._file.with_suffix(".new")
            new.write_text(text)
            new.replace(self._file)
            self._written = text
