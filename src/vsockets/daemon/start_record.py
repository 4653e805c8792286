"""Remember how vsockd was started, so that after a crash no program starts it otherwise.

A program that needs vsockd and finds none starts one: on demand, with the configuration of the
program's environment.  Where vsockd is started by a command or a service manager that would be
another one than its administrator's, with other guests and profiles, and would keep the right one
out.  So vsockd leaves a record in the state folder while it runs; a service's stays when it is
stopped, because its service manager is to start it again.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")


class How(StrEnum):
    """What has started vsockd."""

    ON_DEMAND = "on demand"  #: a program that needed it
    COMMAND = "by a command"  #: ``vsock up`` or ``vsockd``
    SERVICE = "as a service"


class OtherwiseStarted(Exception):
    """The vsockd that ended here is to be started in another way; the text says in which."""


@dataclass(frozen=True, slots=True)
class Start:
    """How a vsockd was started, and with which configuration."""

    how: How
    configuration: Path
    #: whether the configuration is that of the caller's environment, and not a deliberate one
    is_default: bool = False

    def require_admitted(self, record: Path) -> None:
        """Raise OtherwiseStarted if the vsockd before this one, by its ``record``, forbids it."""
        before = _read(record)
        if before is None:
            return
        again = f"start it so again, or remove {record} if that is over"
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
        """Leave a record."""
        facts = {"how": self.how, "configuration": str(self.configuration), "boot": _boot()}
        new = record.with_suffix(".new")
        new.write_text(json.dumps(facts))
        new.replace(record)


def _read(record: Path) -> Start | None:
    """Return what ``record`` says, unless it is of before the machine's start."""
    try:
        facts = json.loads(record.read_bytes())
        if facts["boot"] == _boot():
            return Start(How(facts["how"]), Path(facts["configuration"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # there is none, or only a part of one: of a vsockd that never served
    return None


def _boot() -> str:
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return os.uname().release
