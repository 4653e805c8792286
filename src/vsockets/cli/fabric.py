"""``vsock fabric``: run a command in a private fabric that ends with it.

The command has two processes.  This process becomes ``vsock run`` for the command.  The other, the
*keeper*, has the fabric, starts programs for each ``vsock run`` within the command
(:mod:`.delegation`), and removes everything when the command has ended or this process is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import socket
from pathlib import Path
from typing import NoReturn

import click

from ..model.constants import VMADDR_CID_HOST
from ..played.personalities import NAMES, find
from ..supervisor.launch import ENDED, FAILURE, MESSAGE
from .delegation import LAUNCHER
from .errors import CliError, one_line
from .groups import command
from .options import (
    parse_guest,
    parser_of,
    path_option,
    place_option,
    read_guest,
    reserved_ports_option,
)
from .output import complain
from .run import interceptor_option, program_argument, run_here

#: Longest report of the keeper on whether the fabric serves, in bytes.
_REPORT_MAX = 1 << 16

_LAST_STANDARD = 2

#: Seconds for vsockd to end when its keeper was killed; it takes a tenth of one.
_VSOCKD_SECONDS = 5.0


@parser_of
def _read_hybrid(text: str) -> tuple[int, Path]:
    cid, separator, path = text.partition("=")
    if not (separator and path):
        raise ValueError(f"invalid guest and path: {text!r} (expected CID=PATH)")
    return parse_guest(cid), Path(path).absolute()


@parser_of
def _read_personality(text: str) -> str:
    find(text)
    return text


@command("fabric", context_settings={"allow_interspersed_args": False})
@program_argument("COMMAND")
@place_option(
    "--cid", default="host", help="Context of the command: a number or host. A guest is created."
)
@click.option(
    "--as",
    "hypervisor",
    type=_read_personality,
    metavar="HYPERVISOR[@VERSION]",
    help=f"Play a machine of this hypervisor: {', '.join(NAMES)}. vsock played controls it.",
)
@path_option(
    "--socket", metavar="PATH", help="With --as: unix socket of the machine. Default: a new one."
)
@click.option(
    "--guest",
    "guests",
    type=read_guest,
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
    hypervisor: str | None,
    socket: Path | None,
    guests: tuple[int, ...],
    hybrid: tuple[tuple[int, Path], ...],
    reserved_ports: bool,
    interceptor: str,
) -> None:
    """Run a command in a fabric of its own, such as a test suite.

    The command runs on the host of the new fabric, or in a guest with --cid; its AF_VSOCK leads
    there.  A program on the other side is started by vsock run within the command.  When the
    command ends, so do the fabric and every process that is left in it.  If the command fails,
    vsockd's log is printed on standard error, with what was denied, unless it is empty.
    """
    if context.parent is not None and context.parent.params.get("folder") is not None:
        raise click.UsageError("--dir has no effect: vsock fabric uses a folder of its own")
    paths = dict(hybrid)
    if len(paths) < len(hybrid):
        raise click.UsageError("--hybrid: two paths for one guest (expected one CID=PATH)")
    wanted = {one: paths.get(one) for one in (*guests, *paths)}
    if cid != VMADDR_CID_HOST:
        wanted.setdefault(cid, None)
    if LAUNCHER in os.environ:
        raise CliError(
            "not possible within another vsock fabric: vsockd would be supervised (start a "
            "program in the outer fabric: vsock run --cid CID -- PROGRAM)"
        )
    if socket is not None and hypervisor is None:
        raise click.UsageError("--socket: needs --as (expected --as HYPERVISOR)")
    machine = None
    if hypervisor is not None:
        machine = hypervisor, None if socket is None else os.path.abspath(socket)
        host = find(hypervisor).host_cid
        if cid == VMADDR_CID_HOST:
            cid = host
        wanted.pop(host, None)
    keeper = _start_keeper(wanted, reserved_ports, machine)
    run_here(program, cid, interceptor=interceptor, keeper=keeper)


class _Keeper:
    """The connection to the keeper, from the process of the command."""

    def __init__(self, sock: socket.socket, pid: int, vsockd: int, folder: Path) -> None:
        """Take ownership of ``sock``; ``vsockd`` is a pidfd, ``folder`` is to be removed."""
        # The command's process closes its standard error.
        self._errors = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, _LAST_STANDARD + 1)
        self.pid = pid
        self._sock = sock
        self._vsockd = vsockd
        self._folder = folder

    def descriptors(self) -> list[int]:
        """Return the descriptors to keep open, that of the connection first."""
        return [self._sock.fileno(), self._vsockd, self._errors]

    def end(self, status: int) -> int:
        """Report the command's wait status; return the final status once the fabric is removed."""
        with contextlib.suppress(OSError):
            self._sock.send(MESSAGE.pack(ENDED, status))
        message = b""
        with contextlib.suppress(OSError):
            message = self._sock.recv(MESSAGE.size)
        if message:
            return int(MESSAGE.unpack(message)[1])
        self._clean_up()
        return status or FAILURE

    def _clean_up(self) -> None:
        """Remove what a killed keeper has left; its vsockd and programs end by themselves."""
        os.dup2(self._errors, 2)
        with contextlib.suppress(OSError):  # standard error is closed
            complain("fabric: the process that kept the fabric was killed; the fabric is removed")
        ended, _, _ = select.select([self._vsockd], [], [], _VSOCKD_SECONDS)
        if not ended:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._vsockd, signal.SIGKILL)
        shutil.rmtree(self._folder, ignore_errors=True)


def _start_keeper(
    guests: dict[int, Path | None], reserved_ports: bool, machine: tuple[str, str | None] | None
) -> _Keeper:
    """Start the keeper, and set this process's environment to its fabric.

    Returns the connection to the keeper.

    Raises CliError if the fabric cannot be started.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        # The keeper has no parent here, because vsock run waits for every child.
        if os.fork() == 0:
            _keep(theirs, guests, reserved_ports, machine)
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
    vsockd = os.pidfd_open(report["vsockd"])
    return _Keeper(ours, report["keeper"], vsockd, Path(report["folder"]))


# The keeper


def _keep(
    front: socket.socket,
    guests: dict[int, Path | None],
    reserved_ports: bool,
    machine: tuple[str, str | None] | None,
) -> NoReturn:
    """Keep a fabric until ``front``, the connection to the command's process, is closed.

    The keeper reports an error only before it serves, when the command does not run yet.
    """
    code = 1
    try:
        _detach(front)
        from .fabric_keeper import Keeper

        Keeper(front, guests, reserved_ports, machine).run()
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
