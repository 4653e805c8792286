"""``vsock vm``: run virtual machines under QEMU, each a context of the fabric."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import click

from ..limits import NAME_MAX_CHARACTERS
from ..vm.hardware import translate
from ..vm.qemu_args import PROGRAM, Card, Disk, MachineOptions, domain_xml, machine_arguments
from ..vmware import VmxError, read_vmx
from .connect import administrator
from .demo.vm import demo
from .errors import CliError
from .groups import group
from .options import path_option, seconds_option
from .output import notice
from .run import context_of
from .vm_options import (
    Accelerator,
    Device,
    Network,
    accelerators,
    extra_argument,
    find_firmware,
    find_qemu,
    machine_options,
    require_qmp,
)

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
    grace: float,
    device: Device,
    cid: int | None,
    **described: Any,
) -> None:
    """Run a virtual machine, with its console on this terminal (docs/vm.md).

    Ctrl-] and SIGTERM ask the guest to power off, the second time they cut its power.  The exit
    status is 0 when the guest has powered off, and 128 plus the signal's number after a signal.
    """
    require_qmp()
    machine, cid = _machine(device, cid, **described)
    program = find_qemu(device, qemu, download)
    context.exit(_run(machine, cid, program, grace, extra))


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


vm.add_command(demo)


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
    """Return a machine and its CID; defaults come from the ``.vmx`` file."""
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
            ignored.append(
                "vmci0.unrestricted, vmci0.domain (see: vsock context add --profile legacy)"
            )
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


def _run(
    machine: MachineOptions, cid: int | None, qemu: str, grace: float, extra: tuple[str, ...]
) -> int:
    import asyncio

    from ..vm.machine import MachineFailed, RunningMachine

    with administrator(start=True) as control:
        context = context_of(control, cid, machine.name)
        if context["state"] == "off":
            raise CliError(
                f"context {cid} is powered off (power it on: vsock context power-on {cid})"
            )
        notice(f"context {context['cid']}; Ctrl-] powers the machine off")
        running = RunningMachine(
            machine,
            *(qemu, control, context["cid"]),
            extra=extra,
            grace=grace,
            report=notice,
        )
        try:
            return asyncio.run(running.run())
        except MachineFailed as error:
            raise CliError(str(error)) from None
