"""``vsock vm``: virtual machines under QEMU, each a context of the fabric."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..vm.arguments import FORMATS, Card, Disk, Machine, arguments
from .advice import Failure
from .context import read_cid
from .output import notice
from .reach import administrator
from .run import context_of

app = typer.Typer(help="Virtual machines under QEMU.", rich_markup_mode=None)


class Device(StrEnum):
    """What a guest has its vSockets from."""

    VMCI = "vmci"
    VIRTIO = "virtio"


class Network(StrEnum):
    """What a guest has besides."""

    NONE = "none"
    USER = "user"


class Accelerator(StrEnum):
    """How a guest's processor is run."""

    AUTO = "auto"
    KVM = "kvm"
    TCG = "tcg"


_SUFFIXES = {"img": "raw", **{format: format for format in FORMATS}}
_UNITS = {"": 1, "m": 1, "mib": 1, "g": 1024, "gib": 1024}


def _read_memory(text: str) -> int:
    """MiB."""
    found = re.fullmatch(r"(\d{1,9})(m|mib|g|gib|)", text.lower())
    if not found or int(found[1]) == 0:
        raise typer.BadParameter(f"{text!r}: expected a number of MiB, or one like 512M or 2G")
    return int(found[1]) * _UNITS[found[2]]


def _read_disk(text: str) -> Disk:
    format, colon, path = text.partition(":")
    if not colon or format not in FORMATS:
        path, format = text, _SUFFIXES.get(Path(text).suffix.removeprefix("."), "")
    # The format is never guessed from what is in the file: a guest could write anything there.
    if not format:
        formats = ", ".join(FORMATS)
        raise typer.BadParameter(f"{text}: expected FORMAT:PATH, where FORMAT is one of {formats}")
    return Disk(os.path.abspath(_existing(path)), format)


def _existing(path: str) -> str:
    if not os.path.exists(path):
        raise typer.BadParameter(f"there is no file {path}")
    return path


_Cid = Annotated[
    int | None,
    typer.Option(
        parser=read_cid,
        metavar="CID",
        help="Its context; by default a new one. A context that does not exist is made.",
    ),
]
_Name = Annotated[str, typer.Option(help="For people to recognise it by.")]
_Device = Annotated[Device, typer.Option(help="What the guest has its vSockets from.")]
_Kernel = Annotated[
    str | None, typer.Option(parser=_existing, metavar="FILE", help="Boot this Linux kernel.")
]
_Initrd = Annotated[
    str | None, typer.Option(parser=_existing, metavar="FILE", help="Its first file system.")
]
_Append = Annotated[str, typer.Option(help="With --kernel: its command line.")]
_Disk = Annotated[
    list[Disk] | None,
    typer.Option(
        "--disk",
        parser=_read_disk,
        metavar="[FORMAT:]PATH",
        help="qcow2, raw or vmdk, which the file's name tells by default; can be repeated.",
    ),
]
_Memory = Annotated[
    int | None, typer.Option(parser=_read_memory, metavar="SIZE", help="512M (the default), 2G, …")
]
_Cpus = Annotated[int | None, typer.Option(min=1, help="Processors; by default one.")]
_Network = Annotated[
    Network, typer.Option(help="user: a card behind which QEMU translates addresses.")
]
_Accel = Annotated[Accelerator, typer.Option(help="auto: KVM where this user may, else emulation.")]
_Qemu = Annotated[str | None, typer.Option("--qemu", metavar="PROGRAM", help="Which QEMU.")]
_Download = Annotated[
    bool,
    typer.Option(
        "--download",
        help="Where no QEMU can do the device: unpack Debian's newest below ~/.cache/vsockets.",
    ),
]
_Extra = Annotated[
    list[str] | None,
    typer.Argument(metavar="[-- ARGUMENT...]", help="Further arguments for QEMU, as they are."),
]


@app.command("run")
def run(
    extra: _Extra = None,
    cid: _Cid = None,
    name: _Name = "",
    device: _Device = Device.VMCI,
    kernel: _Kernel = None,
    initrd: _Initrd = None,
    append: _Append = "",
    disk: _Disk = None,
    memory: _Memory = None,
    cpus: _Cpus = None,
    network: _Network = Network.NONE,
    accel: _Accel = Accelerator.AUTO,
    qemu: _Qemu = None,
    download: _Download = False,
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
    machine = Machine(
        device.value,
        memory or _MEMORY,
        cpus or 1,
        name,
        _accelerators(accel),
        *(kernel or "", initrd or "", append),
        disks=tuple(disk or ()),
        cards=(Card(),) * (network is Network.USER),
    )
    raise typer.Exit(_run(machine, cid, _find_qemu(device, qemu, download), grace, extra))


#: Of a guest about which nothing is said, in MiB.
_MEMORY = 512


def _run(
    machine: Machine, cid: int | None, qemu: str, grace: float, extra: list[str] | None
) -> int:
    try:
        from ..vm.machine import Failed, RunningMachine
    except ModuleNotFoundError as error:
        raise Failure(f"{error.name} is missing: pip install 'vsockets[vm]'") from None
    with administrator(start=True) as control:
        context = context_of(control, cid, machine.name)
        if context["state"] == "off":
            raise Failure(f"context {cid} is powered off: vsock context power-on {cid}")
        notice(f"context {context['cid']}; Ctrl-] powers the machine off")
        running = RunningMachine(
            machine,
            *(qemu, control, context["cid"]),
            extra=tuple(extra or ()),
            grace=grace,
            tell=notice,
        )
        try:
            return asyncio.run(running.run())
        except Failed as error:
            raise Failure(str(error)) from None


def _find_qemu(device: Device, program: str | None, download: bool) -> str:
    from ..vm.packages import Unavailable
    from ..vm.qemu import NoQemu, find

    try:
        return find(device.value, program, download).path
    except (NoQemu, Unavailable) as error:
        raise Failure(str(error)) from None


def _accelerators(accel: Accelerator) -> tuple[str, ...]:
    usable = os.access("/dev/kvm", os.R_OK | os.W_OK)
    if accel is Accelerator.KVM and not usable:
        raise Failure(
            "--accel kvm: this user may not use /dev/kvm, or there is none (vsock doctor)"
        )
    if accel is Accelerator.AUTO:
        return ("kvm", "tcg") if usable else ("tcg",)
    return (accel.value,)


@app.command("args")
def args(device: _Device = Device.VMCI) -> None:
    """x."""
    print(shlex.join(arguments(Machine(device.value, _MEMORY), "/run/vsock")))
