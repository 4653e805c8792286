"""``vsock run``: unmodified programs as part of a context."""

from __future__ import annotations

import errno
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ..attachment import Attachment
from ..control import Control
from ..model.constants import AF_VSOCK, VMADDR_CID_HOST
from .connect import administrator
from .errors import CliError
from .execute import exec_program
from .options import ReservedPortsOption, read_cid

#: By the state of a context in which no program has a vSockets socket.
_HOW_TO_START = {"off": ("powered off", "power-on"), "suspended": ("suspended", "resume")}


class Interceptor(StrEnum):
    """Values of --interceptor."""

    AUTO = "auto"
    NOTIFY = "notify"
    TRACE = "trace"


def run(
    program: Annotated[
        list[str], typer.Argument(metavar="PROGRAM [ARGUMENT]...", help="What to run.")
    ],
    cid: Annotated[
        int | None,
        typer.Option(
            parser=read_cid,
            metavar="CID",
            help="The context; host is one. A guest that does not exist is made.",
        ),
    ] = None,
    name: Annotated[
        str, typer.Option(metavar="NAME", help="What to call a guest that is made.")
    ] = "",
    reserved_ports: ReservedPortsOption = False,
    device: Annotated[
        bool,
        typer.Option(
            "--device",
            help="Show /dev/vsock to programs that look for it, where the machine has none for "
            "everybody. Each stat() and access() of any file then takes about 10 us longer.",
        ),
    ] = False,
    interceptor: Annotated[
        Interceptor,
        typer.Option(
            envvar="VSOCKETS_INTERCEPTOR",
            help="The mechanism that intercepts system calls: seccomp notification, or ptrace, "
            "which also works where a container forbids AF_VSOCK. Auto selects by a test.",
        ),
    ] = Interceptor.AUTO,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Show which mechanism intercepts, and why."),
    ] = False,
) -> None:
    """Run any program, unmodified, as part of a context: its AF_VSOCK is the fabric's.

    By default that is a new guest, which goes when the program and all its children have
    ended.  Starts vsockd if need be.
    """
    # Here, because no other command needs them.
    from ..supervisor.launch import launch
    from ..supervisor.mechanism import choose
    from ..supervisor.process import inherited_sockets

    for fd in inherited_sockets(AF_VSOCK):
        raise CliError(
            f"descriptor {fd} is a socket of the machine's own AF_VSOCK, which {program[0]} must "
            "not inherit: close it, or if it is a service manager's (LISTEN_FDS), "
            "let that listen elsewhere"
        )
    if reserved_ports and cid == VMADDR_CID_HOST:
        raise typer.BadParameter("--reserved-ports is for guests")
    control = administrator(start=True)
    context = context_of(control, cid, name, reserved_ports)
    if context["state"] in _HOW_TO_START:
        state, command = _HOW_TO_START[context["state"]]
        raise CliError(
            f"context {cid} is {state}: no program can run in it until "
            f"vsock context {command} {cid}"
        )

    folder = context["folder"]

    def program_starts() -> NoReturn:
        exec_program(program, environment(folder))

    lease = control.fileno() if context["leased"] else None
    try:
        choice = choose(interceptor.value)
        if verbose:
            sys.stderr.write(f"vsock run: interceptor {choice.name}: {choice.reason}\n")
        launch(program_starts, Attachment(folder), lease, device, choice.mechanism)
    except OSError as error:
        raise CliError(f"cannot supervise {program[0]}: {_why(error)}") from None


def _why(error: OSError) -> str:
    if error.errno == errno.EBUSY:
        return "a supervisor is at work already (vsock run within vsock run, or a container's)"
    if error.errno == errno.EPERM:
        return (
            "it may not be traced (a container needs --cap-add SYS_PTRACE or another seccomp "
            "profile; kernel.yama.ptrace_scope must be 0 or 1; see: vsock doctor)"
        )
    if error.errno in (errno.EINVAL, errno.ENOSYS):
        return "this kernel has no seccomp notification (Linux 5.14 or later; see: vsock doctor)"
    return os.strerror(error.errno or errno.EIO)


def environment(folder: str | Path) -> dict[str, str]:
    """The environment of a program in the context with this folder.

    Programs that know vSockets use the context directly, and need no supervisor.
    """
    return {
        **os.environ,
        "VSOCKETS_CONTEXT": os.fspath(folder),
        "VSOCKETS_TRANSPORT": "fabric",
    }


def context_of(
    control: Control, cid: int | None, name: str, reserved_ports: bool = False
) -> dict[str, Any]:
    """Return the context to run something in, made if need be; ``leased`` says whether
    ``control`` has a lease of it.

    Raises CliError if it exists without the ``reserved_ports`` that are asked for.
    """
    while True:
        try:
            if cid != VMADDR_CID_HOST:
                return control.add_context(cid, name, lease=True, reserved_ports=reserved_ports)
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
        for context in control.contexts():
            if context["cid"] == cid:
                if reserved_ports and not context["reserved_ports"]:
                    raise CliError(
                        f"context {cid} exists, without reserved ports (make it with them: "
                        f"vsock context add {cid} --reserved-ports)"
                    )
                return {**context, "leased": False}
        # It existed, and was removed between the two questions.
