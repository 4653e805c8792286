"""Options of the commands of ``vsock vm``, and what follows from their values."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

import click

from ..vm.qemu_args import FORMATS, Disk
from .errors import CliError
from .options import argument, count_option, members, parser_of, path_option, read_cid


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
    click.option(
        "--cid",
        type=read_cid,
        metavar="CID",
        help="Context of the guest; created if it does not exist. Default: a new one.",
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
    """Return the path of the QEMU to use.

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

    Raises CliError if KVM is asked for and not usable.
    """
    usable = os.access("/dev/kvm", os.R_OK | os.W_OK)
    if accel is Accelerator.KVM and not usable:
        raise CliError("--accel kvm: this user cannot open /dev/kvm (see: vsock doctor)")
    if accel is Accelerator.AUTO:
        return ("kvm", "tcg") if usable else ("tcg",)
    return (accel.value,)
