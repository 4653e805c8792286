"""``vsock vm``: run virtual machines under QEMU, each a context of the fabric."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any

import click

from ..guestrpc.client import RequestFailed, request, tools_run
from ..limits import NAME_MAX_CHARACTERS
from ..model.address import parse_cid
from ..model.locator import Vsock
from ..state_folder import default_folder
from ..vm.hardware import translate
from ..vm.limits import VM_AGENT_CHUNK_BYTES, VM_AGENT_REPLY_SECONDS, VM_COPY_MAX_MIB
from ..vm.qemu_agent import AGENT_PORT, AgentFailed, QemuAgent
from ..vm.qemu_args import (
    FORMATS,
    PROGRAM,
    Card,
    Disk,
    MachineOptions,
    domain_xml,
    machine_arguments,
)
from ..vmware import VmxError, read_vmx
from . import guestinfo
from .connect import administrator, cid_of_name, connected
from .errors import CliError
from .groups import group
from .options import (
    argument,
    count_option,
    guest_option,
    json_option,
    members,
    parser_of,
    path_option,
    read_port,
    seconds_option,
)
from .output import complain, notice
from .run import context_of, program_argument


class Device(StrEnum):
    """Devices that give a guest its vSockets."""

    VMCI = "vmci"
    VIRTIO = "virtio"


class Network(StrEnum):
    """Networks of a guest."""

    NONE = "none"
    USER = "user"


class Accelerator(StrEnum):
    """Ways to run a guest's processors."""

    AUTO = "auto"
    KVM = "kvm"
    TCG = "tcg"


_SUFFIXES = {"img": "raw", **{format: format for format in FORMATS}}
_UNITS = {"": 1, "m": 1, "mib": 1, "g": 1024, "gib": 1024}


@parser_of
def _read_memory(text: str) -> int:
    """Return a size of memory in MiB."""
    found = re.fullmatch(r"(\d{1,9})(m|mib|g|gib|)", text.lower())
    if not found or int(found[1]) == 0:
        raise ValueError(f"{text!r}: expected a number of MiB, or a size such as 512M or 2G")
    return int(found[1]) * _UNITS[found[2]]


@parser_of
def _read_disk(text: str) -> Disk:
    format, colon, path = text.partition(":")
    if not colon or format not in FORMATS:
        path, format = text, _SUFFIXES.get(Path(text).suffix.removeprefix("."), "")
    # The format is never detected from the contents, which a guest can write.
    if not format:
        formats = ", ".join(FORMATS)
        raise ValueError(f"{text!r}: expected FORMAT:PATH, where FORMAT is one of {formats}")
    return Disk(os.path.abspath(_existing_file(path)), format)


@parser_of
def _existing_file(path: str) -> str:
    if not os.path.exists(path):
        raise ValueError(f"{path!r}: no such file (expected an existing one)")
    return path


device_option = click.option(
    "--device",
    **members(Device),
    default=Device.VMCI.value,
    help="Device that gives the guest its vSockets.",
)
accel_option = click.option(
    "--accel",
    **members(Accelerator),
    default=Accelerator.AUTO.value,
    help="Accelerator. auto: KVM if this user may use it, else emulation (tcg).",
)
extra_argument = argument(
    "extra",
    nargs=-1,
    type=click.UNPROCESSED,
    metavar="[-- ARGUMENT...]",
    help="Further arguments for QEMU, passed unchanged.",
)
_MACHINE_OPTIONS = (
    guest_option(
        "--cid", help="Context of the guest; created if it does not exist. Default: a new one."
    ),
    click.option(
        "--name", default="", show_default=False, metavar="NAME", help="Name shown in listings."
    ),
    device_option,
    path_option(
        "--vmx",
        metavar="FILE",
        help="Take defaults from this .vmx file of a VMware machine; options override them.",
    ),
    click.option(
        "--kernel",
        type=_existing_file,
        metavar="FILE",
        help="Linux kernel to boot.",
    ),
    click.option(
        "--initrd",
        type=_existing_file,
        metavar="FILE",
        help="With --kernel: initial RAM disk.",
    ),
    click.option(
        "--append",
        default="",
        show_default=False,
        metavar="TEXT",
        help="With --kernel: command line of the kernel.",
    ),
    click.option(
        "--disk",
        type=_read_disk,
        multiple=True,
        metavar="[FORMAT:]PATH",
        help="Disk image; repeatable. FORMAT is qcow2, raw or vmdk. "
        "Default: the format of the file's suffix.",
    ),
    click.option(
        "--memory",
        type=_read_memory,
        metavar="SIZE",
        help="Memory, in MiB or as in 2G. Default: 512M.",
    ),
    count_option("--cpus", metavar="N", help="Number of processors. Default: 1."),
    click.option(
        "--network",
        **members(Network),
        default=Network.NONE.value,
        help="Network card. user: one with address translation by QEMU.",
    ),
    accel_option,
)


def machine_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare the options that describe a virtual machine, in the order of the help."""
    for option in reversed(_MACHINE_OPTIONS):
        function = option(function)
    return function


def require_qmp() -> None:
    """Raise CliError unless the package qemu.qmp, which controls QEMU, is installed."""
    try:
        import qemu.qmp  # noqa: F401
    except ModuleNotFoundError:
        why = "the Python package qemu.qmp, which controls QEMU, is missing"
        raise CliError(f"{why}: pip install qemu.qmp") from None


def find_qemu(device: Device, program: str | None, download: bool) -> str:
    """Return the path of a QEMU that supports ``device``.

    ``program`` is used if given; ``download`` permits to download a QEMU.

    Raises CliError if none supports the device.
    """
    from ..vm.apt import Unavailable
    from ..vm.qemu import QemuNotFound, find

    try:
        return find(device.value, program, download).path
    except (QemuNotFound, Unavailable) as error:
        raise CliError(str(error)) from None


def find_firmware() -> str:
    """Return the path of the UEFI firmware to use.

    Raises CliError if it is missing.
    """
    from ..vm import qemu
    from ..vm.apt import Unavailable

    try:
        return qemu.find_firmware()
    except Unavailable as error:
        raise CliError(str(error)) from None


def accelerators(accel: Accelerator) -> tuple[str, ...]:
    """Return the accelerators for QEMU to try, in this order.

    Raises CliError if KVM is asked for, and this user cannot use it.
    """
    usable = os.access("/dev/kvm", os.R_OK | os.W_OK)
    if accel is Accelerator.KVM and not usable:
        raise CliError("--accel kvm: this user cannot open /dev/kvm (see: vsock doctor)")
    if accel is Accelerator.AUTO:
        return ("kvm", "tcg") if usable else ("tcg",)
    return (accel.value,)


#: Memory of a guest without --memory and .vmx file, in MiB.
_MEMORY = 512


@group("vm")
def vm() -> None:
    """Run virtual machines under QEMU."""


@vm.command("run")
@extra_argument
@machine_options
@click.option(
    "--qemu", metavar="PROGRAM", help="QEMU to use. Default: one that supports the device."
)
@click.option(
    "--download",
    is_flag=True,
    help="If no QEMU here supports the device, unpack Debian's newest below ~/.cache/vsockets.",
)
@click.option(
    "--vmware-tools",
    is_flag=True,
    help="Let the guest's VMware Tools work: the machine looks like VMware's, and vsock guestinfo "
    "serve, which must run, serves it with the variables of the .vmx file.",
)
@click.option(
    "--wait-ready",
    is_flag=True,
    help="Have the guest's systemd report its start: show it, publish the event ready, and notify "
    "this command's own service manager.",
)
@click.option(
    "--register",
    is_flag=True,
    help="Register the machine with systemd-machined: machinectl list shows it.",
)
@seconds_option(
    "--grace", default=10.0, help="Time that the guest has to power off when asked, in seconds."
)
@click.pass_context
def run(
    context: click.Context,
    /,
    extra: tuple[str, ...],
    qemu: str | None,
    download: bool,
    vmware_tools: bool,
    wait_ready: bool,
    register: bool,
    grace: float,
    device: Device,
    cid: int | None,
    **described: Any,
) -> None:
    """Run a virtual machine, with its console on this terminal (docs/vm.md).

    Ctrl-] and SIGTERM ask the guest to power off, the second time they cut its power.  The exit
    status is 0 when the guest has powered off, and 128 plus the signal's number after a signal.
    """
    machine, cid = _machine(device, cid, **described)
    if not (machine.kernel or machine.disks or extra):
        raise click.UsageError(
            "nothing to boot (expected --kernel, --disk, --vmx of a machine with a disk, or "
            "arguments for QEMU, such as -- -cdrom FILE)"
        )
    require_qmp()
    program = find_qemu(device, qemu, download)
    tools = _VMwareTools(described["vmx"]) if vmware_tools else None
    if tools is not None:
        if device is Device.VIRTIO:
            notice("over virtio, VMware Tools need a module of the guest (docs/guestinfo.md)")
        machine = dataclasses.replace(machine, vmware_serial=tools.serial)
    context.exit(_run(machine, cid, program, grace, extra, tools, wait_ready, register))


@vm.command("args")
@path_option(
    "--socket",
    "path",
    required=True,
    metavar="PATH",
    help="Unix socket that the device creates and QEMU connects to.",
)
@machine_options
@click.option("--libvirt", is_flag=True, help="Print additions to a libvirt domain's XML instead.")
def args(path: Path, libvirt: bool, device: Device, cid: int | None, **described: Any) -> None:
    """Print the commands that start a virtual machine: the device's, and QEMU's.

    The device's process must listen before QEMU starts.
    """
    machine, cid = _machine(device, cid, **described)
    where = os.path.abspath(path)
    command = ["vsock", "device", device.value, "--socket", where]
    command += [] if cid is None else ["--cid", str(cid)]
    if libvirt:
        notice(f"start the device first: {shlex.join(command)}")
        print(domain_xml(device.value, where))
        return
    print(shlex.join(command), "&")
    print(shlex.join([PROGRAM, *machine_arguments(machine, where), "-serial", "mon:stdio"]))


@vm.command("demo")
@device_option
@accel_option
@path_option(
    "--copy",
    "folder",
    metavar="DIR",
    help="Folder to copy into the guest and back. Default: generated files.",
)
@json_option
def demo(device: Device, accel: Accelerator, folder: Path | None, as_json: bool) -> None:
    """Boot a guest without a network card, and access it by vSockets.

    The guest consists of packages of this machine's distribution: its kernel, busybox, and Python
    with this program.  A folder is copied in and out, a web page is fetched from the guest, and
    on a terminal the demo ends with a shell in the guest.  Downloads (by apt, some 150 MB, 300 MB
    on disk) are kept in ~/.cache/vsockets; nothing else is left.
    """
    from .demo.vm import show

    show(device, accel, folder, as_json)


_agent_port_option = click.option(
    "--port",
    type=read_port,
    default=str(AGENT_PORT),
    metavar="PORT",
    help="Port at which the guest's qemu-ga listens.",
)


@vm.command("exec", context_settings={"allow_interspersed_args": False})
@argument("guest", metavar="GUEST", help="Guest: its CID, or its context's name.")
@program_argument("PROGRAM")
@_agent_port_option
@click.option(
    "-i", "--stdin", "has_input", is_flag=True, help="Send all of standard input to the program."
)
def exec_(guest: str, program: tuple[str, ...], port: int, has_input: bool) -> None:
    """Run a program in a guest, by QEMU's guest agent (docs/vm.md).

    Its output is shown when it ends, up to 16 MiB; the exit status is the program's.
    """
    command = list(program[program[0] == "--" :])
    if not command:
        raise click.UsageError("expected a PROGRAM after --")
    given = sys.stdin.buffer.read() if has_input else b""
    with _agent(guest, port) as agent:
        done = agent.run(command, given)
    sys.stdout.buffer.write(done.output)
    sys.stdout.buffer.flush()
    sys.stderr.buffer.write(done.errors)
    sys.stderr.buffer.flush()
    if done.is_cut:
        complain("the guest agent has not kept all of the output (it keeps 16 MiB)")
    raise click.exceptions.Exit(done.status)


@vm.command("reboot")
@argument("guest", metavar="GUEST", help="Guest: its CID, or its context's name.")
@_agent_port_option
def reboot(guest: str, port: int) -> None:
    """Ask a guest to reboot: its VMware Tools if they run, else QEMU's guest agent (docs/vm.md).

    The command ends when the guest has agreed.  The guest's programs are shut down; its machine,
    and the command that runs it, go on.
    """
    cid, folder = _cid_of(guest), default_folder()
    missing = f"guest {guest}: no VMware Tools run in it"
    if tools_run(folder, cid):
        try:
            request(folder, "send", cid=cid, change="reboot")
        except (OSError, RequestFailed) as error:
            missing = str(error)
        else:
            return
    try:
        with _agent(guest, port) as agent:
            agent.reboot()
    except CliError as error:
        raise CliError(f"{missing}, and {error}") from None


@vm.command("copy")
@argument("source", metavar="SOURCE", help="File here, or GUEST:PATH.")
@argument("destination", metavar="DESTINATION", help="File or folder here, or GUEST:PATH.")
@_agent_port_option
@click.option(
    "--limit",
    type=_read_memory,
    metavar="SIZE",
    help="Largest file to copy from a guest, in MiB or as in 2G. Default: 1G.",
)
def copy(source: str, destination: str, port: int, limit: int | None) -> None:
    """Copy a file into a guest or out of it, by QEMU's guest agent (docs/vm.md).

    GUEST is a CID or a context's name.  A file here whose name has a colon is given as ./NAME.
    """
    inside, outside = _in_guest(source), _in_guest(destination)
    if inside is not None and outside is None:
        _copy_out(*inside, Path(destination), port, (limit or VM_COPY_MAX_MIB) << 20)
    elif outside is not None and inside is None:
        _copy_in(Path(source), *outside, port)
    else:
        raise click.UsageError("expected one of SOURCE and DESTINATION as GUEST:PATH")


def _copy_out(guest: str, path: str, destination: Path, port: int, limit: int) -> None:
    """Copy a file to ``destination``, which is replaced once all of it has arrived."""
    if destination.is_dir():
        destination /= PurePosixPath(path).name
    destination = destination.resolve()
    with _agent(guest, port) as agent:
        chunks = agent.read_file(path, limit)
        try:
            if destination.exists() and not destination.is_file():  # a device or a pipe
                _write(destination, chunks)
                return
            fd, new = tempfile.mkstemp(prefix=".vsock-", dir=destination.parent)
            os.close(fd)
            try:
                _write(Path(new), chunks)
                os.chmod(new, 0o666 & ~_umask())
                os.replace(new, destination)
            except BaseException:
                os.unlink(new)
                raise
        except OSError as error:
            raise CliError(f"{destination}: {error.strerror or error}") from None


def _write(path: Path, chunks: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        file.writelines(chunks)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _copy_in(source: Path, guest: str, path: str, port: int) -> None:
    try:
        with source.open("rb") as file, _agent(guest, port) as agent:
            agent.write_file(path, iter(functools.partial(file.read, VM_AGENT_CHUNK_BYTES), b""))
    except OSError as error:
        raise CliError(f"{source}: {error.strerror or error}") from None


def _in_guest(text: str) -> tuple[str, str] | None:
    """Return guest and path of GUEST:PATH; None for a local file."""
    guest, colon, path = text.partition(":")
    return (guest, path) if colon and guest and path and "/" not in guest else None


def _cid_of(guest: str) -> int:
    """Return the CID of a guest that is given by CID or name.  Raises CliError or ValueError."""
    return parse_cid(guest) if guest.isdecimal() else cid_of_name(guest)


@contextlib.contextmanager
def _agent(guest: str, port: int) -> Iterator[QemuAgent]:
    """Yield a connection to a guest's agent.  Raises CliError."""
    sock = connected(Vsock(_cid_of(guest), port), VM_AGENT_REPLY_SECONDS)
    try:
        with QemuAgent(sock) as agent:
            yield agent
    except AgentFailed as error:
        raise CliError(f"guest {guest}: {error}") from None


def _machine(
    device: Device,
    cid: int | None,
    *,
    name: str,
    vmx: Path | None,
    kernel: str | None,
    initrd: str | None,
    append: str,
    disk: tuple[Disk, ...],
    memory: int | None,
    cpus: int | None,
    network: Network,
    accel: Accelerator,
) -> tuple[MachineOptions, int | None]:
    """Return the machine to run and its CID; missing options come from the ``.vmx`` file."""
    if kernel is None and (initrd is not None or append):
        raise click.UsageError("--initrd and --append need --kernel")
    boot = (kernel or "", initrd or "", append)
    disks = disk
    firmware = ""
    cards: tuple[Card, ...] = (Card(),)
    if vmx is not None:
        try:
            described = read_vmx(vmx)
            if device is Device.VMCI:
                described.require_vmci()
            found = translate(described, os.path.dirname(os.path.abspath(vmx)))
            name = name or described.display_name[:NAME_MAX_CHARACTERS]
            cid = described.cid if cid is None else cid
            isolation = described.unrestricted or described.domain
        except VmxError as error:
            raise click.UsageError(f"--vmx {error}") from None
        memory, cpus = memory or found.memory, cpus or found.cpus
        disks, cards = (*found.disks, *disks), found.cards
        firmware = find_firmware() if found.efi else ""
        ignored = list(found.omitted)
        if network is Network.NONE:
            ignored += [f"ethernet: a {card.model} (--network user adds a card)" for card in cards]
        if isolation:
            add = f"vsock context add --vmx {shlex.quote(str(vmx))} --profile legacy"
            ignored.append(f"vmci0.unrestricted, vmci0.domain (to apply them, before: {add})")
        for line in ignored:
            notice(f"{vmx}: ignored: {line}")
    machine = MachineOptions(
        device.value,
        memory or _MEMORY,
        cpus or 1,
        name,
        accelerators(accel),
        *boot,
        firmware,
        disks,
        cards if network is Network.USER else (),
    )
    return machine, cid


class _VMwareTools:
    """VMware Tools of a guest, which may have a ``.vmx`` file."""

    def __init__(self, vmx: Path | None) -> None:
        """Read the file.  Raises click.UsageError if a key for the tools is invalid."""
        self._vmx = vmx
        #: the SMBIOS serial number, from ``uuid.bios`` as VMware makes it
        self.serial = "VMware"
        if vmx is not None:
            described = read_vmx(vmx)  # has been read before
            uuid = described.text("uuid.bios")
            self.serial = f"VMware-{uuid}" if uuid.isprintable() and uuid else self.serial
            guestinfo.described(vmx)

    def admit(self, cid: int) -> None:
        """Have the service serve the guest's tools.  Raises CliError if it does not run."""
        guestinfo.admit(cid, self._vmx)

    def halt(self, cid: int) -> None:
        """Ask the tools to halt the guest.  Raises RequestFailed or OSError."""
        request(default_folder(), "send", cid=cid, change="halt")


def _run(
    machine: MachineOptions,
    cid: int | None,
    qemu: str,
    grace: float,
    extra: tuple[str, ...],
    tools: _VMwareTools | None,
    wait_ready: bool,
    register: bool,
) -> int:
    import asyncio

    from ..vm.machine import MachineFailed, RunningMachine
    from ..vm.machined import RegistrationFailed, machine_name, registered

    with administrator(start=True) as control:
        context = context_of(control, cid, machine.name)
        if context["state"] == "off":
            raise CliError(
                f"context {cid} is powered off (power it on: vsock context power-on {cid})"
            )
        found = context["cid"]
        if tools is not None:
            tools.admit(found)
        notice(f"context {found}; Ctrl-] powers the machine off")
        running = RunningMachine(
            machine,
            *(qemu, control, found),
            extra=extra,
            grace=grace,
            halt=None if tools is None else functools.partial(tools.halt, found),
            wait_ready=wait_ready,
            report=notice,
        )
        name = machine_name(machine.name, found)
        leader = registered(name, found, os.getpid()) if register else contextlib.nullcontext()
        try:
            with leader:
                return asyncio.run(running.run())
        except (MachineFailed, RegistrationFailed) as error:
            raise CliError(str(error)) from None
