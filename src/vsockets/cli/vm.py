"""``vsock vm``: virtual machines under QEMU, each a context of the fabric."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from ..limits import NAME_MAX_CHARACTERS
from ..vm.hardware import translate
from ..vm.qemu_args import PROGRAM, Card, Disk, MachineOptions, domain_xml, machine_arguments
from ..vmware import VmxError, read_vmx
from .connect import administrator
from .demo import vm
from .errors import CliError
from .output import notice
from .run import context_of
from .vm_options import (
    Accelerator,
    AccelOption,
    AppendOption,
    CidOption,
    CpusOption,
    Device,
    DeviceOption,
    DiskOption,
    DownloadOption,
    ExtraArguments,
    InitrdOption,
    KernelOption,
    MemoryOption,
    NameOption,
    Network,
    NetworkOption,
    QemuOption,
    VmxOption,
    accelerators,
    find_firmware,
    find_qemu,
    require_qmp,
)

app = typer.Typer(help="Virtual machines under QEMU.", rich_markup_mode=None)


@app.command("run")
def run(
    extra: ExtraArguments = None,
    cid: CidOption = None,
    name: NameOption = "",
    device: DeviceOption = Device.VMCI,
    vmx: VmxOption = None,
    kernel: KernelOption = None,
    initrd: InitrdOption = None,
    append: AppendOption = "",
    disk: DiskOption = None,
    memory: MemoryOption = None,
    cpus: CpusOption = None,
    network: NetworkOption = Network.NONE,
    accel: AccelOption = Accelerator.AUTO,
    qemu: QemuOption = None,
    download: DownloadOption = False,
    grace: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=0.0, help="How long the guest may take to power off when asked."
        ),
    ] = 10.0,
) -> None:
    """Run a virtual machine; its console is here (docs/vm.md).

    Ctrl-], or SIGTERM, has the guest power off; the second time its power is cut.  The exit
    status is 0 when the guest has powered off, 128 and the signal's number after a signal.
    """
    require_qmp()
    boot = (kernel or "", initrd or "", append)
    parts = (device, name, boot, tuple(disk or ()), memory, cpus, network, accel)
    machine, cid = _described(vmx, cid, *parts)
    program = find_qemu(device, qemu, download)
    raise typer.Exit(_run(machine, cid, program, grace, extra))


@app.command("args")
def args(
    path: Annotated[
        Path, typer.Option("--socket", metavar="PATH", help="Where the device is to wait.")
    ],
    cid: CidOption = None,
    name: NameOption = "",
    device: DeviceOption = Device.VMCI,
    vmx: VmxOption = None,
    kernel: KernelOption = None,
    initrd: InitrdOption = None,
    append: AppendOption = "",
    disk: DiskOption = None,
    memory: MemoryOption = None,
    cpus: CpusOption = None,
    network: NetworkOption = Network.NONE,
    accel: AccelOption = Accelerator.AUTO,
    libvirt: Annotated[
        bool, typer.Option("--libvirt", help="What to add to a libvirt domain's XML instead.")
    ] = False,
) -> None:
    """Print how to start a virtual machine oneself: the device's command, and QEMU's.

    The device's process must wait before QEMU starts.
    """
    boot = (kernel or "", initrd or "", append)
    parts = (device, name, boot, tuple(disk or ()), memory, cpus, network, accel)
    machine, cid = _described(vmx, cid, *parts)
    where = os.path.abspath(path)
    command = ["vsock", "device", device.value, "--socket", where]
    command += [] if cid is None else ["--cid", str(cid)]
    if libvirt:
        notice(f"start the device first: {shlex.join(command)}")
        print(domain_xml(device.value, where))
        return
    print(shlex.join(command), "&")
    print(shlex.join([PROGRAM, *machine_arguments(machine, where), "-serial", "mon:stdio"]))


app.command("demo")(vm.demo)


#: Of a guest about which nothing is said, in MiB.
_MEMORY = 512


def _described(
    vmx: Path | None,
    cid: int | None,
    device: Device,
    name: str,
    boot: tuple[str, str, str],
    disks: tuple[Disk, ...],
    memory: int | None,
    cpus: int | None,
    network: Network,
    accel: Accelerator,
) -> tuple[MachineOptions, int | None]:
    """A machine and its CID: what options do not say is as its ``.vmx`` file says."""
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
            raise typer.BadParameter(str(error)) from None
        memory, cpus = memory or found.memory, cpus or found.cpus
        disks, cards = (*found.disks, *disks), found.cards
        firmware = find_firmware() if found.efi else ""
        left = list(found.omitted)
        if network is Network.NONE:
            left += [f"ethernet: a {card.model}; --network user gives it one" for card in cards]
        if isolation:
            left.append("vmci0.unrestricted, vmci0.domain: see vsock context add --profile legacy")
        for line in left:
            notice(f"{vmx}: not carried over: {line}")
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


def _run(
    machine: MachineOptions, cid: int | None, qemu: str, grace: float, extra: list[str] | None
) -> int:
    import asyncio

    from ..vm.machine import MachineFailed, RunningMachine

    with administrator(start=True) as control:
        context = context_of(control, cid, machine.name)
        if context["state"] == "off":
            raise CliError(f"context {cid} is powered off: vsock context power-on {cid}")
        notice(f"context {context['cid']}; Ctrl-] powers the machine off")
        running = RunningMachine(
            machine,
            *(qemu, control, context["cid"]),
            extra=tuple(extra or ()),
            grace=grace,
            report=notice,
        )
        try:
            return asyncio.run(running.run())
        except MachineFailed as error:
            raise CliError(str(error)) from None
