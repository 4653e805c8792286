"""``vsock up``, ``down``, ``reload`` and ``status``: start, stop and inspect vsockd."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from .. import launcher
from ..limits import DAEMON_RESTARTS_DEFAULT
from ..state_folder import default_folder
from .connect import administrator
from .groups import command
from .options import json_option, log_format_option
from .output import Column, print_json, print_table


@command("up")
@click.option(
    "--foreground", is_flag=True, help="Run vsockd in this process, until SIGTERM or Ctrl-C."
)
@click.option(
    "--log-level",
    type=click.Choice(("debug", "info", "warning", "error")),
    default="warning",
    help="Lowest level that vsockd logs; with --foreground.",
)
@log_format_option
@click.option(
    "--replace",
    is_flag=True,
    help="Replace a running vsockd by a new process.  Nothing is lost.",
)
@click.option(
    "--restarts",
    type=click.IntRange(min=0),
    metavar="N",
    help="How often a minute vsockd is started again, with all that it had, when it was killed or "
    f"has crashed; 0: never.  Default: {DAEMON_RESTARTS_DEFAULT}.  Applies when vsockd is started: "
    "a replacement keeps the number.",
)
def up(
    foreground: bool, log_level: str, log_format: str, replace: bool, restarts: int | None
) -> None:
    """Start vsockd, the fabric's daemon, unless it runs already."""
    folder = default_folder()
    if replace and foreground:
        raise click.UsageError("--replace and --foreground exclude each other")
    if foreground:
        options = ["--log-level", log_level, "--log-format", log_format]
        if restarts is not None:
            options += ["--restarts", str(restarts)]
        _exec_vsockd(folder, *options)
    started = launcher.start(folder, on_demand=False, restarts=restarts)
    with administrator(start=True) as control:
        pid = control.status()["pid"]
        if replace and not started and restarts is not None:
            raise click.UsageError(
                f"--restarts: vsockd already runs in {folder}, and a replacement keeps its number "
                "(omit --restarts, or stop vsockd first: vsock down)"
            )
        if replace and not started:
            print(f"vsockd in {folder} was replaced (pid {pid}, now {control.replace()})")
            return
    print(f"vsockd {'serves' if started else 'is already running in'} {folder} (pid {pid})")


def _exec_vsockd(folder: Path, *options: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "VSOCKETS_CONTEXT"}
    # The folder of this package, which may not be installed.
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")))
    )
    program = [sys.executable, "-m", "vsockets.daemon", "--dir", os.fspath(folder)]
    os.execve(sys.executable, [*program, *options], environment)


@command("down")
def down() -> None:
    """Stop vsockd.  Established streams continue; new connects fail."""
    with administrator() as control:
        folder = control.folder
        control.stop()
    print(f"vsockd in {folder} has ended")


@command("reload")
def reload() -> None:
    """Make vsockd read its configuration again.  No connection is dropped."""
    with administrator() as control:
        control.reload()


@command("status")
@json_option
def status(as_json: bool) -> None:
    """Show whether vsockd runs, and its load."""
    with administrator() as control:
        facts = control.status()
    if as_json:
        print_json(facts)
        return
    facts["uptime"] = f"{facts['uptime']} s"
    rows = [(name.replace("_", " "), value) for name, value in facts.items()]
    print_table([Column("vsockd"), Column("", whole=False)], rows)
