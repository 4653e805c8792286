"""The ``vsockd`` program."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
from functools import partial
from pathlib import Path

from .. import logs
from .._linux.folders import describe
from .._linux.sd_notify import notify_ready
from ..fabric import Refused
from ..state_folder import LOG, default_folder
from .configuration import ConfigurationError, default_configuration_folder
from .crash_records import How, OtherwiseStarted, Start
from .succession import Predecessor, wait_for_successors
from .vsockd import AlreadyRunning, Vsockd

#: Command of the relay for hybrid vsock, a device process.  With -P, no module is loaded from the
#: current directory.
_RELAY = (sys.executable, "-P", "-m", "vsockets.devices.hybrid.relay")


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
    parser.add_argument("--succeed", type=int, metavar="FD", help=argparse.SUPPRESS)
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
    is invalid.  69 (EX_UNAVAILABLE): this vsockd must be started in another way.  1: the state
    folder was removed, or vsockd cannot start in it.
    """
    arguments = make_parser().parse_args()
    level = logging.getLevelNamesMapping()[arguments.log_level.upper()]
    logs.configure("vsockd: %(levelname)s: %(message)s", level, arguments.log_format)
    is_successor = arguments.succeed is not None
    try:
        if is_successor and arguments.background:
            logs.write_to(arguments.dir / LOG, keep=True)
        predecessor = Predecessor(arguments.succeed) if is_successor else None
        successor = _successor(arguments)
        vsockd = Vsockd(arguments.dir, _start(arguments), _RELAY, successor, predecessor)
    except AlreadyRunning as error:
        print(f"vsockd: {error}", file=sys.stderr)
        return os.EX_TEMPFAIL
    except ConfigurationError as error:
        print(f"vsockd: {error}", file=sys.stderr)
        return os.EX_CONFIG
    except OtherwiseStarted as error:
        print(f"vsockd: {error}", file=sys.stderr)
        return os.EX_UNAVAILABLE
    except (OSError, Refused) as error:
        problem = describe(error) if isinstance(error, OSError) else error
        print(f"vsockd: cannot start in {arguments.dir}: {problem}", file=sys.stderr)
        return 1
    if arguments.background and not is_successor and not _detach(vsockd.folder / LOG):
        return 0  # the calling program's process; vsockd continues in its child
    # Objects made so far live as long as vsockd, and requests create no reference cycles.
    gc.freeze()
    gc.set_threshold(50_000)
    gc.enable()
    ready = partial(_announce_ready, arguments.ready_fd, is_successor)
    found = vsockd.run(ready, arguments.lifeline_fd)
    if vsockd.is_replaced:
        stays = not (is_successor or arguments.background)
        folder = vsockd.leave(stays)
        if stays:
            return wait_for_successors(folder, vsockd.is_stopping)
    return 0 if found else 1


def _successor(arguments: argparse.Namespace) -> list[str]:
    """Return the command that starts a successor, to be completed by a descriptor's number."""
    command = [sys.executable, "-P", "-m", "vsockets.daemon"]
    command += ["--dir", str(arguments.dir.absolute()), "--log-format", arguments.log_format]
    command += ["--log-level", arguments.log_level]
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


def _detach(log: Path) -> bool:
    """Continue in a child process, with ``log`` as standard output and error.

    Return True in the child, False in the parent.
    """
    if os.fork():
        return False
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.close(null)
    logs.write_to(log)
    return True


def _announce_ready(ready_fd: int | None, is_successor: bool) -> None:
    if ready_fd is not None:
        os.write(ready_fd, b"ready\n")
        os.close(ready_fd)
    if not is_successor:  # else its service is ready already
        notify_ready()


if __name__ == "__main__":
    sys.exit(main())
