"""Records in the state folder that a crash of vsockd leaves to the next one.

*Isolation.*  Guests that were added at run time are lost in a crash.  If the next guest with such a
CID is added without a profile, it is ``restricted`` as the previous one was: a crash does not
weaken isolation.

*Start.*  A program that needs vsockd and finds none starts one on demand, with the configuration of
its own environment.  Where vsockd is normally started by a command or a service manager, a vsockd
started on demand would have other guests and profiles than the administrator intended, and would
keep the right vsockd from starting.  So vsockd leaves a record in the state folder while it runs; a
service's record remains when it is stopped, because its service manager is expected to start it
again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from .._linux.folders import shown_path
from ..fabric import Context, Isolation, Profile

_RESTRICTED = Isolation(Profile.RESTRICTED)


class IsolatedGuests:
    """The CIDs of restricted guests, recorded in ``file`` by this vsockd and earlier ones."""

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
        """Record which of ``contexts`` are restricted now.

        Raises OSError when the file cannot be written.
        """
        now = {context.cid for context in contexts if context.isolation == _RESTRICTED}
        text = "\n".join(map(str, sorted(now | self.before)))
        if text != self._written:
            new = self._file.with_suffix(".new")
            new.write_text(text)
            new.replace(self._file)
            self._written = text


_BOOT = Path("/proc/sys/kernel/random/boot_id")


class How(StrEnum):
    """The way vsockd was started."""

    ON_DEMAND = "on demand"  #: by a program that needed it
    COMMAND = "by a command"  #: ``vsock up`` or ``vsockd``
    SERVICE = "as a service"


class OtherwiseStarted(Exception):
    """A start that the previous vsockd's record forbids; the text says how to start vsockd."""


@dataclass(frozen=True, slots=True)
class Start:
    """The way vsockd was started, and its configuration."""

    how: How
    configuration: Path
    #: True if the configuration comes from the caller's environment, not from an option
    is_default: bool = False

    def require_admitted(self, record: Path) -> None:
        """Raise OtherwiseStarted if the ``record`` of the previous vsockd forbids this start."""
        before = _read(record)
        if before is None:
            return
        again = f"start it in that way again, or remove {shown_path(record)} to allow any start"
        if self.how is How.ON_DEMAND and before.how is not How.ON_DEMAND:
            raise OtherwiseStarted(
                f"not started on demand: vsockd was started {before.how}, with the configuration "
                f"{before.configuration}, and has ended ({again})"
            )
        if self.is_default and before.configuration != self.configuration:
            raise OtherwiseStarted(
                f"not started with the configuration {self.configuration}: the vsockd that has "
                f"ended here had {before.configuration} ({again})"
            )

    def write(self, record: Path) -> None:
        """Write the record."""
        facts = {"how": self.how, "configuration": str(self.configuration), "boot": _boot()}
        new = record.with_suffix(".new")
        new.write_text(json.dumps(facts))
        new.replace(record)


def _read(record: Path) -> Start | None:
    """Return the start in ``record``; None if it is missing, invalid or from before a reboot."""
    try:
        facts = json.loads(record.read_bytes())
        if facts["boot"] == _boot():
            return Start(How(facts["how"]), Path(facts["configuration"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # missing, or incomplete because that vsockd never served
    return None


def _boot() -> str:
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return os.uname().release
