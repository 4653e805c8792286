"""``vsock up``, ``down``, ``reload`` and ``status``: the life of vsockd."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .. import launcher
from ..state_folder import default_folder
from .connect import administrator
from .options import LogFormat, LogFormatOption
from .output import Column, print_json, print_table


class LogLevel(StrEnum):
    """How much vsockd says."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def up(
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Be vsockd, until SIGTERM or Ctrl-C.")
    ] = False,
    log_level: Annotated[
        LogLevel, typer.Option(help="What vsockd logs; with --foreground.")
    ] = LogLevel.WARNING,
    log_format: LogFormatOption = LogFormat.TEXT,
) -> None:
    """Start vsockd, the fabric's daemon, unless it runs already."""
    folder = default_folder()
    if foreground:
        _be_vsockd(folder, "--log-level", log_level.value, "--log-format", log_format.value)
    started = launcher.start(folder, on_demand=False)
    with administrator(start=True) as control:
        pid = control.status()["pid"]
    print(f"vsockd {'serves' if started else 'is already running in'} {folder} (pid {pid})")


def _be_vsockd(folder: Path, *options: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "VSOCKETS_CONTEXT"}
    # Where this package is, for when it was not installed.
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")))
    )
    program = [sys.executable, "-m", "vsockets.daemon", "--dir", os.fspath(folder)]
    os.execve(sys.executable, [*program, *options], environment)


def down() -> None:
    """Stop vsockd.  Streams that stand go on; nothing new can be connected."""
    with administrator() as control:
        folder = control.folder
        control.stop()
    print(f"vsockd in {folder} has ended")


def reload() -> None:
    """Have vsockd read its configuration again.  Nothing is dropped."""
    with administrator() as control:
        control.reload()


def status(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show whether vsockd runs, and what it has to do."""
    with administrator() as control:
        facts = control.status()
    if as_json:
        print_json(facts)
        return
    facts["uptime"] = f"{facts['uptime']} s"
    rows = [(name.replace("_", " "), value) for name, value in facts.items()]
    print_table([Column("vsockd"), Column("", whole=False)], rows)
