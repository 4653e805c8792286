"""``vsock run``: run unmodified programs in a context."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ..attachment import Attachment
from ..control import Control
from ..model.constants import AF_VSOCK, VMADDR_CID_HOST
from .connect import administrator, assigned_context
from .errors import CliError
from .execute import exec_program
from .groups import command
from .options import Decorator, argument, place_option, reserved_ports_option

if TYPE_CHECKING:
    from ..supervisor.launch import Keeper

#: By state of a context in which no program can use vSockets: what it is, and the command that
#: changes that.
_HOW_TO_START = {"off": ("powered off", "power-on"), "suspended": ("suspended", "resume")}


def program_argument(name: str) -> Decorator[Any]:
    """Declare the arguments that are a program, called ``name`` in the help, and its arguments."""
    return argument(
        "program",
        nargs=-1,
        required=True,
        type=click.UNPROCESSED,
        metavar=f"{name} [ARGUMENT]...",
        help=f"{name.capitalize()} to run, and its arguments.",
    )


interceptor_option = click.option(
    "--interceptor",
    type=click.Choice(("auto", "notify", "trace")),
    default="auto",
    envvar="VSOCKETS_INTERCEPTOR",
    help="Mechanism that intercepts system calls: seccomp notification, or ptrace, which also "
    "works where a container forbids AF_VSOCK. auto: selected by a test.",
)


@command("run", context_settings={"allow_interspersed_args": False})
@program_argument("PROGRAM")
@place_option(
    "--cid",
    help="Context to run in: a number or host. A guest that does not exist is created. "
    "Default: the context that VSOCKETS_CONTEXT names or that is mounted at /run/vsock/self, else "
    "a new guest.",
)
@click.option("--name", default="", show_default=False, metavar="NAME", help="Name of a new guest.")
@reserved_ports_option
@click.option(
    "--device",
    is_flag=True,
    help="Show /dev/vsock to programs that look for it, where the machine has none that every "
    "user can open. Each stat() and access() of any file then takes about 10 us longer.",
)
@interceptor_option
@click.option(
    "-v", "--verbose", is_flag=True, help="Print which mechanism intercepts system calls, and why."
)
def run(
    program: tuple[str, ...],
    cid: int | None,
    name: str,
    reserved_ports: bool,
    device: bool,
    interceptor: str,
    verbose: bool,
) -> None:
    """Run an unmodified program in a context.  AF_VSOCK then leads to the fabric.

    The context is by default the one that this command is in, as in a container that is a guest,
    and otherwise a new guest, which is removed when the program and all its children have ended.
    Starts vsockd if it does not run.
    """
    if reserved_ports and cid == VMADDR_CID_HOST:
        raise click.UsageError("--reserved-ports: not allowed for the host (expected a guest)")
    start: Callable[..., NoReturn] = run_here
    if "VSOCKETS_LAUNCHER" in os.environ:
        from .delegation import delegate as start
    start(
        program=program,
        cid=cid,
        name=name,
        reserved_ports=reserved_ports,
        device=device,
        interceptor=interceptor,
        verbose=verbose,
    )


def run_here(
    program: Sequence[str],
    cid: int | None,
    name: str = "",
    reserved_ports: bool = False,
    device: bool = False,
    interceptor: str = "auto",
    verbose: bool = False,
    keeper: Keeper | None = None,
    lifeline: int | None = None,
) -> NoReturn:
    """Run a program in a context as ``vsock run`` does, and end as it does.

    ``keeper`` and ``lifeline`` are those of :func:`..supervisor.launch.launch`.

    Raises CliError if the program cannot be run, OSError if vsockd does not serve.
    """
    # Imported late: only this command needs them.
    from ..supervisor.launch import launch
    from ..supervisor.mechanism import choose
    from ..supervisor.process import inherited_sockets

    for fd in inherited_sockets(AF_VSOCK):
        raise CliError(
            f"descriptor {fd} is a socket of the machine's own AF_VSOCK, which {program[0]} must "
            "not inherit: close it, or if a service manager passed it (LISTEN_FDS), "
            "configure another address there"
        )
    place = None if cid is not None or name or reserved_ports else assigned_context()
    lease = None
    if place is None:
        control = administrator(start=True)
        context = context_of(control, cid, name, reserved_ports)
        if context["state"] in _HOW_TO_START:
            state, remedy = _HOW_TO_START[context["state"]]
            raise CliError(
                f"context {cid} is {state}: no program can run in it (change that: "
                f"vsock context {remedy} {cid})"
            )
        place = Attachment(context["folder"])
        lease = control.fileno() if context["leased"] else None
    else:
        _ = place.cid  # fails if vsockd does not run or refuses this user

    def program_starts() -> NoReturn:
        exec_program(list(program), environment(place.folder))

    try:
        choice = choose(interceptor)
        if verbose:
            sys.stderr.write(f"vsock run: interceptor {choice.name}: {choice.reason}\n")
        launch(program_starts, place, lease, device, choice.mechanism, keeper, lifeline)
    except OSError as error:
        raise CliError(f"cannot supervise {program[0]}: {_reason(error)}") from None


def _reason(error: OSError) -> str:
    if error.errno == errno.EBUSY:
        return "it has a supervisor already (vsock run within vsock run, or a container's)"
    if error.errno == errno.EALREADY:
        return "it is traced already, by strace -f or gdb (expected: none, or --interceptor notify)"
    if error.errno == errno.EPERM:
        return (
            "ptrace or process_vm_readv is forbidden (in a container: vsock doctor "
            "--seccomp-profile docker|podman|kubernetes writes a profile for --security-opt "
            "seccomp=FILE; elsewhere: sysctl kernel.yama.ptrace_scope=1; see: vsock doctor)"
        )
    if error.errno in (errno.EINVAL, errno.ENOSYS):
        return "this kernel has no seccomp notification (Linux 5.14 or later; see: vsock doctor)"
    return os.strerror(error.errno or errno.EIO)


def environment(folder: str | Path) -> dict[str, str]:
    """Return the environment of a program in the context with this folder.

    Programs that use this library attach to the context directly, and need no supervisor.
    """
    return {
        **os.environ,
        "VSOCKETS_CONTEXT": os.fspath(folder),
        "VSOCKETS_TRANSPORT": "fabric",
    }


def context_of(
    control: Control, cid: int | None, name: str, reserved_ports: bool = False
) -> dict[str, Any]:
    """Return the row of the context to run a program in; create the context if it does not exist.

    ``leased`` in the result is True if ``control`` has a lease of the context.

    Raises CliError if the context exists without ``reserved_ports``, and they are asked for.
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
                        f"context {cid} exists, without reserved ports (create it with them: "
                        f"vsock context add {cid} --reserved-ports)"
                    )
                return {**context, "leased": False}
        # The context existed, and was removed between the two requests.
