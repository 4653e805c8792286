"""``vsock device``: the vSockets device of a virtual machine, a process for each."""

from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from .. import logs
from .._linux.folders import SocketFile, open_folder
from .._linux.process import notify_ready
from ..control import Events
from ..model.locator import check_hybrid_path
from .connect import administrator
from .groups import group
from .options import (
    Decorator,
    configure_log,
    guest_option,
    log_format_option,
    path_option,
    seconds_option,
    verbose_option,
)

if TYPE_CHECKING:
    from ..devices.client import DeviceClient
    from ..devices.loop import DeviceLoop

log = logging.getLogger(__name__)

# Imported late, in functions: what only one of the devices needs.


@group("device")
def device() -> None:
    """Serve the vSockets device of a virtual machine."""


def _socket_option(help: str) -> Decorator[Any]:
    return path_option("--socket", "path", required=True, metavar="PATH", help=help)


_vhost_socket_option = _socket_option("Unix socket to create; the virtual machine connects to it.")
_cid_option = guest_option(
    "--cid", help="Context of the virtual machine. Default: a new one, with a free CID."
)
_until_eof_option = click.option(
    "--until-eof", is_flag=True, help="End when standard input is closed."
)
_sandbox_option = click.option(
    "--sandbox/--no-sandbox",
    default=True,
    help="Drop every privilege and system call that the device does not need.",
)


def _common_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare the options that all devices have: the keyword arguments of :func:`_serve`."""
    options = (_cid_option, _until_eof_option, _sandbox_option, verbose_option, log_format_option)
    for option in reversed(options):
        function = option(function)
    return function


@device.command("vmci")
@_vhost_socket_option
@click.option(
    "--legacy",
    is_flag=True,
    help="Offer the device that guests before Linux 5.18 support (port I/O; slow).",
)
@click.option(
    "--protocol-1",
    "older",
    is_flag=True,
    help="Use the first version of the stream protocol.",
)
@_common_options
def vmci(path: Path, legacy: bool, older: bool, **common: Any) -> None:
    """Serve a virtual machine's VMCI device over vfio-user (docs/vmci.md).

    For QEMU 10.1 and later: -device '{"driver":"vfio-user-pci","socket":{"type":"unix",
    "path":PATH},"x-no-posted-writes":true}', with shared memory.
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

    ready = f"the VMCI device listens at {path}"
    _serve(ready, begin, file=file, **common)


@device.command("virtio")
@_vhost_socket_option
@_common_options
def virtio(path: Path, **common: Any) -> None:
    """Serve a virtual machine's virtio-vsock device over vhost-user (docs/virtio.md).

    For QEMU 7.2 and later: -chardev socket,id=vsock,path=PATH -device
    vhost-user-vsock-pci,chardev=vsock, with shared memory.
    """
    from ..devices.vhost_user import VhostUserServer
    from ..devices.virtio.machine import VirtioMachine

    file = SocketFile(path)

    def begin(attached: _Attached) -> None:
        loop, fabric, events = attached
        machine = VirtioMachine(loop, fabric, fabric.cid, events)
        VhostUserServer(loop, _listen(file), machine.device)

    ready = f"the virtio-vsock device listens at {path}"
    _serve(ready, begin, datagrams=False, seqpacket=True, file=file, **common)


@device.command("hybrid")
@_socket_option("Unix socket of the virtual machine's monitor.")
@seconds_option(
    "--wait",
    default=0.0,
    help="Retry a connect to the guest this long while it has no listener, or the machine does "
    "not run, in seconds.",
)
@_common_options
def hybrid(path: Path, wait: float, **common: Any) -> None:
    """Attach a virtual machine whose vsock is a unix socket: hybrid vsock (docs/hybrid.md).

    PATH is Firecracker's uds_path, Cloud Hypervisor's socket, vhost-device-vsock's uds-path.  For
    each port of the host that the guest may reach and a program listens on there is a socket
    PATH_PORT.  The machine may be started before or after this command.
    """
    from .._linux.process import allow_many_descriptors
    from ..devices.hybrid import HybridMachine

    if problem := check_hybrid_path(str(path.absolute())):
        raise click.UsageError(f"--socket: {problem}")
    place = open_folder(path.absolute().parent)
    machines: list[HybridMachine] = []

    def begin(attached: _Attached) -> None:
        # Relative to the folder, a long path does not exceed the limit of unix socket addresses.
        os.chdir(place)
        allow_many_descriptors()
        os.umask(0o177)  # only this user may connect: clients of these sockets act as the guest
        machines.append(HybridMachine(*attached, path.name, wait))

    try:
        ready = f"hybrid vsock at {path}"
        user = os.fstat(place).st_uid
        _serve(ready, begin, datagrams=False, host_ports=True, user=user, **common)
    finally:
        for machine in machines:
            machine.close()


class _Attached(NamedTuple):
    loop: DeviceLoop
    fabric: DeviceClient
    events: Events


def _listen(file: SocketFile) -> socket.socket:
    """Return the socket that the virtual machine's monitor connects to.

    Raises OSError, with the name of the file, if it cannot be bound.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        file.bind(listener, 0o600)  # only this user may connect
    except OSError as error:
        listener.close()
        why = error.strerror
        if error.errno == errno.EADDRINUSE:
            why = "the path is in use, by a file or a running device (expected an unused path)"
        raise OSError(error.errno, why, os.fspath(file.where)) from None
    listener.listen(1)
    return listener


def _serve(
    ready: str,
    begin: Callable[[_Attached], None],
    *,
    cid: int | None,
    until_eof: bool,
    sandbox: bool,
    verbose: bool,
    log_format: str,
    datagrams: bool = True,
    seqpacket: bool = False,
    host_ports: bool = False,
    user: int | None = None,
    file: SocketFile | None = None,
) -> None:
    """Attach a device to the context ``cid`` and run it; ``begin`` builds the device.

    ``ready`` is the line logged once the device can be connected to.  ``file`` is the unix socket
    that ``begin`` creates, to be removed at the end.  ``datagrams`` and ``seqpacket`` are True if
    the guest has these socket types besides streams.  With ``host_ports`` the device has a unix
    socket for each port of the host, in a folder owned by the uid ``user``.
    """
    from ..devices.client import DeviceClient
    from ..devices.guest_memory import explain_lost_memory
    from ..devices.loop import DeviceLoop
    from ..devices.sandbox import SocketRemoval, enter_sandbox

    configure_log(verbose, log_format, "vsock device")
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
        gc.freeze()  # objects made so far live as long as the device
        if sandbox:
            enter_sandbox(owner if user is None else user, paths=host_ports)
        log.log(logs.NOTICE, "context %d: %s", cid, ready)
        with loop.signalled({signal.SIGTERM: loop.stop, signal.SIGINT: loop.stop}):
            print(cid, flush=True)
            with loop.unhindered():
                loop.run()
        if removal is not None:
            removal.finish()
    sys.stdout.flush()


def _has_ended() -> bool:
    """Return whether standard input has ended; data before its end is discarded."""
    return not os.read(sys.stdin.fileno(), 4096)
