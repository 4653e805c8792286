"""``vsock fabric``: run a command in a private fabric that ends with it.

Two processes: this one becomes ``vsock run`` for the command.  Another, the *keeper*, has the
fabric, starts programs for each ``vsock run`` within the command (:mod:`.delegation`), and removes
all of it when the command has ended or this process is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import NoReturn

import click

from ..model.constants import VMADDR_CID_HOST
from .delegation import LAUNCHER
from .errors import CliError, one_line
from .groups import command
from .options import argument, parser_of, read_cid, reserved_ports_option
from .run import Interceptor, interceptor_option, run_here

#: Longest report of the keeper on whether the fabric serves, in bytes.
_REPORT_MAX = 1 << 16

_LAST_STANDARD = 2


@parser_of
def _read_hybrid(text: str) -> tuple[int, Path]:
    cid, separator, path = text.partition("=")
    if not (separator and path):
        raise ValueError(f"invalid guest and path: {text!r} (expected CID=PATH)")
    return read_cid(cid), Path(path).absolute()


@command("fabric", context_settings={"allow_interspersed_args": False})
@argument(
    "program",
    nargs=-1,
    required=True,
    type=click.UNPROCESSED,
    metavar="COMMAND [ARGUMENT]...",
    help="Command to run, and its arguments.",
)
@click.option(
    "--cid",
    type=read_cid,
    default="host",
    metavar="CID",
    help="Context of the command: a number or host. A guest is created.",
)
@click.option(
    "--guest",
    "guests",
    type=read_cid,
    multiple=True,
    metavar="CID",
    help="Add a guest before the command starts; repeatable. vsock run --cid CID within the "
    "command also creates it.",
)
@click.option(
    "--hybrid",
    type=_read_hybrid,
    multiple=True,
    metavar="CID=PATH",
    help="Add a guest whose ports clients reach at the unix socket PATH by Firecracker's hybrid "
    "vsock; repeatable.",
)
@reserved_ports_option
@interceptor_option
@click.pass_context
def fabric(
    context: click.Context,
    program: tuple[str, ...],
    cid: int,
    guests: tuple[int, ...],
    hybrid: tuple[tuple[int, Path], ...],
    reserved_ports: bool,
    interceptor: Interceptor,
) -> None:
    """Run a command in a fabric of its own, such as a test suite.

    The command runs on the host of the new fabric, or in a guest with --cid; its AF_VSOCK leads
    there.  A program on the other side is started by vsock run within the command.  When the
    command ends, so do the fabric and every process that is left in it.  If the command fails,
    vsockd's log is printed on standard error, with what was denied.
    """
    if context.parent is not None and context.parent.params.get("folder") is not None:
        raise click.BadParameter("--dir has no effect: vsock fabric uses a folder of its own")
    paths = dict(hybrid)
    if len(paths) < len(hybrid):
        raise click.BadParameter("a guest has one path (--hybrid CID=PATH)")
    wanted = {one: paths.get(one) for one in (*guests, *paths)}
    if cid != VMADDR_CID_HOST:
        wanted.setdefault(cid, None)
    if LAUNCHER in os.environ:
        raise CliError(
            "vsock fabric within vsock fabric: its vsockd would be supervised (start a program in "
            "the outer fabric: vsock run --cid CID -- PROGRAM)"
        )
    keeper = _start_keeper(wanted, reserved_ports)
    run_here(program, cid, interceptor=interceptor.value, keeper=keeper)


def _start_keeper(guests: dict[int, Path | None], reserved_ports: bool) -> socket.socket:
    """Start the keeper, and set this process's environment to its fabric.

    Returns the connection to it.  Raises CliError.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        # The keeper has no parent here, because vsock run waits for every child.
        if os.fork() == 0:
            _keep(theirs, guests, reserved_ports)
        os._exit(0)
    theirs.close()
    os.waitpid(child, 0)
    report = json.loads(
        ours.recv(_REPORT_MAX) or b'{"error": "the keeper of the fabric has ended"}'
    )
    if "error" in report:
        raise CliError(report["error"])
    os.environ.pop("VSOCKETS_CONTEXT", None)
    os.environ.update(report["environment"])
    return ours


# The keeper


def _keep(front: socket.socket, guests: dict[int, Path | None], reserved_ports: bool) -> NoReturn:
    """Keep a fabric until ``front``, the connection to the command's process, is closed."""
    code = 1
    try:
        _detach(front)
        from .fabric_keeper import Keeper

        Keeper(front, guests, reserved_ports).run()
        code = 0
    except Exception as error:
        if isinstance(error, click.ClickException):
            error = CliError(error.format_message())
        with contextlib.suppress(OSError):
            front.send(json.dumps({"error": one_line(error)}).encode())
    finally:
        os._exit(code)


def _detach(front: socket.socket) -> None:
    """Move to a process group of its own, and close the descriptors inherited from the command.

    ``front`` and standard error stay open; standard input and output become ``/dev/null``.
    """
    os.setpgid(0, 0)
    os.closerange(_LAST_STANDARD + 1, front.fileno())
    os.closerange(front.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(nothing, fd)
    os.close(nothing)
