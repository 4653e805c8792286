"""``vsock device``: the devices of virtual machines, a process for each."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from .. import logs
from .._linux.folders import SocketFile, open_folder
from .._linux.sd_notify import notify_ready
from ..control import Events
from ..model.locator import check_hybrid_path
from .connect import administrator
from .options import LogFormat, LogFormatOption, read_cid

if TYPE_CHECKING:
    from ..devices.client import DeviceClient
    from ..devices.loop import DeviceLoop

log = logging.getLogger(__name__)

# What a device needs is imported where it is used: no other command needs it.

app = typer.Typer(help="Devices of virtual machines.", rich_markup_mode=None)


_Socket = Annotated[
    Path, typer.Option("--socket", metavar="PATH", help="Where the virtual machine connects.")
]
_Cid = Annotated[
    int | None,
    typer.Option(
        "--cid", parser=read_cid, metavar="CID", help="Its context; by default one that is free."
    ),
]
_UntilEof = Annotated[bool, typer.Option("--until-eof", help="End when standard input does.")]
_Sandbox = Annotated[bool, typer.Option(help="Give up every privilege and system call not needed.")]
_Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Say what happens.")]


@app.command("vmci")
def vmci(
    path: _Socket,
    cid: _Cid = None,
    legacy: Annotated[
        bool,
        typer.Option("--legacy", help="As guests before Linux 5.18 know it; slow."),
    ] = False,
    older: Annotated[
        bool,
        typer.Option("--protocol-1", help="Speak the first version of the stream protocol."),
    ] = False,
    until_eof: _UntilEof = False,
    sandbox: _Sandbox = True,
    verbose: _Verbose = False,
    log_format: LogFormatOption = LogFormat.TEXT,
) -> None:
    """Serve a virtual machine's VMCI device over vfio-user (docs/vmci.md).

    For QEMU from 10.1 on: -device '{"driver":"vfio-user-pci","socket":{"type":"unix",
    "path":PATH},"x-no-posted-writes":true}', with memory that is shared.
    """

    from ..devices.vfio_user import VfioUserServer
    from ..devices.vmci.machine import VmciMachine

    file = SocketFile(path)

    def begin(attached: _Attached) -> None:
        loop, fabric, events = attached
        machine = VmciMachine(
            loop, fabric, fabric.cid, events, pio_device=legacy, protocol_v1=older
        )
        VfioUserServer(loop, _listen(file), machine.device, machine.settle)

    said = f"the VMCI device waits at {path}"
    _serve(said, cid, until_eof, sandbox, verbose, log_format, begin, file=file)


@app.command("virtio")
def virtio(
    path: _Socket,
    cid: _Cid = None,
    until_eof: _UntilEof = False,
    sandbox: _Sandbox = True,
    verbose: _Verbose = False,
    log_format: LogFormatOption = LogFormat.TEXT,
) -> None:
    """Serve a virtual machine's virtio-vsock device over vhost-user (docs/virtio.md).

    For QEMU from 7.2 on: -chardev socket,id=vsock,path=PATH -device
    vhost-user-vsock-pci,chardev=vsock, with memory that is shared.
    """

    from ..devices.vhost_user import VhostUserServer
    from ..devices.virtio.machine import VirtioMachine

    file = SocketFile(path)

    def begin(attached: _Attached) -> None:
        loop, fabric, events = attached
        machine = VirtioMachine(loop, fabric, fabric.cid, events)
        VhostUserServer(loop, _listen(file), machine.device)

    said = f"the virtio-vsock device waits at {path}"
    common = (cid, until_eof, sandbox, verbose, log_format, begin)
    _serve(said, *common, datagrams=False, seqpacket=True, file=file)


@app.command("hybrid")
def hybrid(
    path: Annotated[
        Path,
        typer.Option("--socket", metavar="PATH", help="The unix socket of the machine's monitor."),
    ],
    cid: _Cid = None,
    wait: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="How long a connect to the guest is tried again while nobody listens there, or "
            "the machine does not run.",
        ),
    ] = 0.0,
    until_eof: _UntilEof = False,
    sandbox: _Sandbox = True,
    verbose: _Verbose = False,
    log_format: LogFormatOption = LogFormat.TEXT,
) -> None:
    """Attach a virtual machine whose vsock is a unix socket: hybrid vsock (docs/hybrid.md).

    Firecracker and Cloud Hypervisor call PATH uds_path and socket, vhost-device-vsock uds-path.
    For each port that somebody of the host listens at, and the guest may reach, there is
    PATH_PORT. The machine may be started before or after.
    """
    from .._linux.rlimit import allow_many_descriptors
    from ..devices.hybrid import HybridMachine

    if problem := check_hybrid_path(str(path.absolute())):
        raise typer.BadParameter(problem)
    place = open_folder(path.absolute().parent)
    machines: list[HybridMachine] = []

    def begin(attached: _Attached) -> None:
        # In the folder a path is a name, which no length of the path makes too long.
        os.chdir(place)
        allow_many_descriptors()
        os.umask(0o177)  # who can connect to what is made here is taken for the guest
        machines.append(HybridMachine(*attached, path.name, wait))

    try:
        said = f"hybrid vsock at {path}"
        user = os.fstat(place).st_uid
        _serve(
            said,
            cid,
            until_eof,
            sandbox,
            verbose,
            log_format,
            begin,
            datagrams=False,
            host_ports=True,
            user=user,
        )
    finally:
        for machine in machines:
            machine.close()


class _Attached(NamedTuple):
    loop: DeviceLoop
    fabric: DeviceClient
    events: Events


def _listen(file: SocketFile) -> socket.socket:
    """Return the socket that the virtual machine's monitor connects to.

    Raises: OSError, with the name of the file.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        file.bind(listener, 0o600)  # only this user may connect
    except OSError as error:
        listener.close()
        why = error.strerror
        if error.errno == errno.EADDRINUSE:
            why = "there is a file, or a device that runs (expected a path that is free)"
        raise OSError(error.errno, why, os.fspath(file.where)) from None
    listener.listen(1)
    return listener


def _serve(
    said: str,
    cid: int | None,
    until_eof: bool,
    sandbox: bool,
    verbose: bool,
    log_format: LogFormat,
    begin: Callable[[_Attached], None],
    datagrams: bool = True,
    seqpacket: bool = False,
    host_ports: bool = False,
    user: int | None = None,
    file: SocketFile | None = None,
) -> None:
    """Attach a device to the context ``cid`` and run it; ``begin`` puts it together.

    ``file`` is that of a socket which ``begin`` makes, and is removed at the end.
    ``datagrams``, ``seqpacket``: what the guest has besides streams.  ``host_ports``: it has a unix
    socket for each port of the host, in a folder of ``user``.
    """
    from ..devices.client import DeviceClient
    from ..devices.guest_memory import explain_lost_memory
    from ..devices.loop import DeviceLoop
    from ..devices.sandbox import SocketRemoval, enter_sandbox

    logs.configure(
        "vsock device: %(message)s", logging.INFO if verbose else logs.NOTICE, log_format.value
    )
    with administrator(start=True) as control:
        if cid is None or all(row["cid"] != cid for row in control.contexts()):
            cid = control.add_context(cid, lease=True)["cid"]
        link = control.attach_device(cid, seqpacket, host_ports)
        owner = next(row["owner"] for row in control.contexts() if row["cid"] == cid)
        events = control.events("context")
        loop = DeviceLoop()
        if until_eof:
            loop.watch(sys.stdin.fileno(), lambda _: loop.stop() if _has_ended() else None)
        begin(_Attached(loop, DeviceClient(loop, link, cid, datagrams), events))
        removal = SocketRemoval(file) if file is not None else None
        notify_ready()
        explain_lost_memory()
        if sandbox:
            enter_sandbox(owner if user is None else user, paths=host_ports)
        log.log(logs.NOTICE, "context %d: %s", cid, said)
        with loop.signalled({signal.SIGTERM: loop.stop, signal.SIGINT: loop.stop}):
            print(cid, flush=True)
            with loop.unhindered():
                loop.run()
        if removal is not None:
            removal.finish()
    sys.stdout.flush()


def _has_ended() -> bool:
    """Whether standard input is over; what comes before that says nothing to us."""
    return not os.read(sys.stdin.fileno(), 4096)
