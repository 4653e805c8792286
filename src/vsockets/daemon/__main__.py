"""The ``vsockd`` program."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .. import logs
from .._linux.cloning import can_share_descriptors
from .._linux.folders import describe
from .._linux.process import notify_ready
from ..fabric import Refused
from ..limits import DAEMON_RESTARTS_DEFAULT
from ..state_folder import LOG, default_folder
from . import earlier_format
from .configuration import ConfigurationError, default_configuration_folder
from .crash_records import How, OtherwiseStarted, Start
from .holder import Holder
from .journal import JournalDamaged
from .recovery import Killed
from .succession import (
    FORMAT,
    NOT_TAKEN_OVER,
    NotTakenOver,
    Predecessor,
    wait_for_successors,
)
from .vsockd import AlreadyRunning, Vsockd

log = logging.getLogger(__name__)

#: Command of the relay for hybrid vsock, a device process.  With -P, no module is loaded from the
#: current directory.
_RELAY = (sys.executable, "-P", "-m", "vsockets.devices.hybrid.relay")


#: Exit statuses of errors that prevent the start.
_STATUS: dict[type[Exception], int] = {
    AlreadyRunning: os.EX_TEMPFAIL,
    ConfigurationError: os.EX_CONFIG,
    OtherwiseStarted: os.EX_UNAVAILABLE,
    JournalDamaged: 1,
}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="vsockd", description=__doc__)
    parser.add_argument(
        "--dir", type=Path, default=default_folder(), help="state folder (default: %(default)s)"
    )
    parser.add_argument(
        "--background", action="store_true", help="run in the background; return when ready"
    )
    parser.add_argument(
        "--on-demand",
        action="store_true",
        help="refuse to start where the last vsockd was not started on demand and has ended",
    )
    parser.add_argument(
        "--ready-fd", type=int, metavar="FD", help="descriptor to write a line to when ready"
    )
    parser.add_argument(
        "--lifeline-fd",
        type=int,
        metavar="FD",
        help="descriptor of a pipe or socket: end when its other end is closed",
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=DAEMON_RESTARTS_DEFAULT,
        metavar="N",
        help="start vsockd again, with all that it had, when it was killed or has crashed, at "
        "most N times a minute (default: %(default)s; 0: never)",
    )
    parser.add_argument("--succeed", type=int, metavar="FD", help=argparse.SUPPRESS)
    parser.add_argument(
        "--format", type=int, default=earlier_format.FORMAT, help=argparse.SUPPRESS
    )  # of the state that the vsockd before hands over
    parser.add_argument(
        "--config",
        type=Path,
        metavar="DIR",
        help=f"folder of the *.toml files (default: {default_configuration_folder()})",
    )
    parser.add_argument(
        "--log-format", default="text", choices=logs.FORMATS, help="json: one object per line"
    )
    parser.add_argument(
        "--log-level", default="warning", choices=["debug", "info", "warning", "error"]
    )
    return parser


def main() -> int:
    """Run vsockd until SIGTERM; return the exit status.

    75 (EX_TEMPFAIL): another vsockd runs in the state folder.  78 (EX_CONFIG): the configuration
    is invalid.  69 (EX_UNAVAILABLE): this vsockd must be started in another way.  76 (EX_PROTOCOL):
    this vsockd was to take over from another one, and has not.  1: the state
    folder was removed, or vsockd cannot start in it, or its journal is damaged.  More than 128: the
    number of the signal that ended vsockd, plus 128.
    """
    arguments = make_parser().parse_args()
    level = logging.getLevelNamesMapping()[arguments.log_level.upper()]
    logs.configure("vsockd: %(levelname)s: %(message)s", level, arguments.log_format)
    if arguments.background and arguments.succeed is None:
        return _run_in_background(partial(_hold, arguments))
    return _hold(arguments, lambda: None)


def _run_in_background(run: Callable[[Callable[[], None]], int]) -> int:
    """Call ``run`` in a child process, with a function to call when the caller may continue.

    Return 0 in the caller's process when that function was called, else the child's exit status.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        if os.read(reader, 1):
            return 0  # vsockd continues in the child
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(reader)
    os.setsid()

    def detach() -> None:
        os.write(writer, b"r")
        os.close(writer)

    return run(detach)


def _hold(arguments: argparse.Namespace, detach: Callable[[], None]) -> int:
    """Run vsockd, and start it again if it is killed, unless that is forbidden or impossible."""
    if arguments.restarts and not can_share_descriptors():
        log.warning("vsockd is not started again if it is killed: unsupported processor")
        arguments.restarts = 0
    if not arguments.restarts:
        return _serve(arguments, detach, None)
    remains = arguments.succeed is None and not arguments.background
    return Holder(arguments.restarts, remains).run(partial(_serve, arguments, detach))


def _serve(arguments: argparse.Namespace, detach: Callable[[], None], holder: Holder | None) -> int:
    """Run vsockd in this process; return the exit status."""
    is_again = holder is not None and holder.is_again
    is_successor = arguments.succeed is not None and not is_again
    try:
        if arguments.background and (is_successor or is_again):
            logs.write_to(arguments.dir / LOG, keep=True)
        predecessor = _predecessor(arguments, holder)
        command = _successor(arguments)
        in_flight = None if holder is None else holder.in_flight
        vsockd = Vsockd(arguments.dir, _start(arguments), _RELAY, command, predecessor, in_flight)
    except tuple(_STATUS) as error:
        print(f"vsockd: {error}", file=sys.stderr)
        return _STATUS[type(error)]
    except (OSError, Refused) as error:
        problem = describe(error) if isinstance(error, OSError) else error
        print(f"vsockd: cannot start in {arguments.dir}: {problem}", file=sys.stderr)
        return NOT_TAKEN_OVER if is_successor else 1
    if arguments.background and not (is_successor or is_again):
        _use_log(vsockd.folder / LOG)
        detach()
    # Objects made so far live as long as vsockd, and requests create no reference cycles.
    gc.freeze()
    gc.set_threshold(50_000)
    gc.enable()
    is_first = not (is_successor or is_again)
    ready_fd, lifeline_fd = arguments.ready_fd, arguments.lifeline_fd
    if is_again:
        ready_fd = lifeline_fd = None
    ready = partial(_announce_ready, ready_fd, is_first, holder)
    try:
        found = vsockd.run(ready, lifeline_fd)
    except NotTakenOver as error:
        log.warning("%s", error)
        return NOT_TAKEN_OVER
    if vsockd.is_replaced:
        stays = not (is_successor or arguments.background)
        folder = vsockd.leave(stays)
        if stays and holder is None:
            return wait_for_successors(folder, vsockd.is_stopping)
    return 0 if found else 1


def _predecessor(
    arguments: argparse.Namespace, holder: Holder | None
) -> Predecessor | Killed | None:
    """Return the vsockd that this one takes over from, or None."""
    if holder is not None and holder.is_again:
        return Killed(holder.in_flight, holder.inherited)
    return None if arguments.succeed is None else Predecessor(arguments.succeed, arguments.format)


def _successor(arguments: argparse.Namespace) -> list[str]:
    """Return the command that starts a successor; the caller appends a descriptor's number."""
    command = [sys.executable, "-P", "-m", "vsockets.daemon"]
    command += ["--dir", str(arguments.dir.absolute()), "--log-format", arguments.log_format]
    command += ["--log-level", arguments.log_level, "--restarts", str(arguments.restarts)]
    command += ["--format", str(FORMAT)]
    if arguments.config is not None:
        command += ["--config", str(arguments.config.absolute())]
    flags = {"--background": arguments.background, "--on-demand": arguments.on_demand}
    return [*command, *(flag for flag, given in flags.items() if given), "--succeed"]


def _start(arguments: argparse.Namespace) -> Start:
    how = How.COMMAND
    if arguments.on_demand:
        how = How.ON_DEMAND
    elif "NOTIFY_SOCKET" in os.environ:
        how = How.SERVICE
    configuration: Path = arguments.config or default_configuration_folder()
    is_default = arguments.background and arguments.config is None
    return Start(how, configuration.absolute(), is_default)


def _use_log(log: Path) -> None:
    """Make ``log`` standard output and error, and close standard input."""
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.close(null)
    logs.write_to(log)


def _announce_ready(ready_fd: int | None, is_first: bool, holder: Holder | None) -> None:
    if ready_fd is not None:
        os.write(ready_fd, b"ready\n")
        os.close(ready_fd)
    if holder is not None:
        os.environ.pop("NOTIFY_SOCKET", None)  # the holder notifies
        if is_first:
            holder.announce_ready()
    elif is_first:  # else its service is ready already
        notify_ready()


if __name__ == "__main__":
    sys.exit(main())
