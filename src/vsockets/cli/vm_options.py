"""What the commands of ``vsock vm`` take, and what they do with it."""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..vm.qemu_args import FORMATS, Disk
from .errors import CliError
from .options import read_cid


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


CidOption = Annotated[
    int | None,
    typer.Option(
        parser=read_cid,
        metavar="CID",
        help="Its context; by default a new one. A context that does not exist is made.",
    ),
]
NameOption = Annotated[str, typer.Option(help="For people to recognise it by.")]
DeviceOption = Annotated[Device, typer.Option(help="What the guest has its vSockets from.")]
KernelOption = Annotated[
    str | None, typer.Option(parser=_existing, metavar="FILE", help="Boot this Linux kernel.")
]
InitrdOption = Annotated[
    str | None, typer.Option(parser=_existing, metavar="FILE", help="Its first file system.")
]
AppendOption = Annotated[str, typer.Option(help="With --kernel: its command line.")]
DiskOption = Annotated[
    list[Disk] | None,
    typer.Option(
        "--disk",
        parser=_read_disk,
        metavar="[FORMAT:]PATH",
        help="qcow2, raw or vmdk, which the file's name tells by default; can be repeated.",
    ),
]
MemoryOption = Annotated[
    int | None, typer.Option(parser=_read_memory, metavar="SIZE", help="512M (the default), 2G, …")
]
CpusOption = Annotated[int | None, typer.Option(min=1, help="Processors; by default one.")]
NetworkOption = Annotated[
    Network, typer.Option(help="user: a card behind which QEMU translates addresses.")
]
AccelOption = Annotated[
    Accelerator, typer.Option(help="auto: KVM where this user may, else emulation.")
]
QemuOption = Annotated[str | None, typer.Option("--qemu", metavar="PROGRAM", help="Which QEMU.")]
DownloadOption = Annotated[
    bool,
    typer.Option(
        "--download",
        help="Where no QEMU can do the device: unpack Debian's newest below ~/.cache/vsockets.",
    ),
]
ExtraArguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[-- ARGUMENT...]", help="Further arguments for QEMU, as they are."),
]


VmxOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A VMware machine's .vmx file: what options do not say is as it says.",
    ),
]


def require_qmp() -> None:
    """Raise CliError unless the package that speaks with QEMU's monitor is installed."""
    try:
        import qemu.qmp  # noqa: F401
    except ModuleNotFoundError:
        why = "the Python package qemu.qmp is missing (it is not QEMU, which it controls)"
        raise CliError(f"{why}: pip install qemu.qmp") from None


def find_qemu(device: Device, program: str | None, download: bool) -> str:
    """The QEMU to use; CliError."""
    from ..vm.apt import Unavailable
    from ..vm.qemu import QemuNotFound, find

    try:
        return find(device.value, program, download).path
    except (QemuNotFound, Unavailable) as error:
        raise CliError(str(error)) from None


def find_firmware() -> str:
    """The UEFI firmware to use; CliError."""
    from ..vm import qemu
    from ..vm.apt import Unavailable

    try:
        return qemu.find_firmware()
    except Unavailable as error:
        raise CliError(str(error)) from None


def accelerators(accel: Accelerator) -> tuple[str, ...]:
    """Those that QEMU is to try; CliError."""
    usable = os.access("/dev/kvm", os.R_OK | os.W_OK)
    if accel is Accelerator.KVM and not usable:
        raise CliError("--accel kvm: there is no /dev/kvm for this user; see vsock doctor")
    if accel is Accelerator.AUTO:
        return ("kvm", "tcg") if usable else ("tcg",)
    return (accel.value,)
