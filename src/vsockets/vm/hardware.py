"""Translation of a VMware machine's hardware to QEMU's.

Hardware that QEMU cannot provide is reported with its key in the ``.vmx`` file, not replaced.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from ..vmware import Vmx
from .qemu_args import SATA_PORTS, Card, Disk

#: VMware's default memory in MiB, and the unit that its size must be a multiple of.
_MEMORY, _MEMORY_STEP = 32, 4

#: VMware's SCSI controllers that QEMU emulates, by ``scsiN.virtualDev``.
_SAME_SCSI = {"pvscsi": "pvscsi", "lsisas1068": "lsisas1068"}

#: VMware's network cards that QEMU emulates, by ``ethernetN.virtualDev``.
_SAME_CARDS = {"e1000": "e1000", "e1000e": "e1000e", "vmxnet3": "vmxnet3"}

_DISK_KEY = re.compile(r"((scsi|sata|ide|nvme)(\d)):(\d{1,2})\.present")
_CARD_KEY = re.compile(r"(ethernet\d{1,2})\.present")
_PRESENT = re.compile(r"([a-z_]+\d*)(:\d+)?\.present")

#: Not reported: present in every QEMU machine, or controllers of devices that are reported.
_PLATFORM = re.compile(r"(pcibridge|hpet|vmci|scsi|sata|ide|nvme|ethernet|ehci|usb_xhci)\d*")

#: Keys that change how a machine boots or resumes and that have no effect here.
_IGNORED_KEYS = {
    "checkpoint.vmstate": "the machine was suspended: its memory is lost and it boots",
    "uefi.secureboot.enabled": "secure boot is off",
    "bios.bootorder": "disks are tried in the order of their controllers",
    "bios.hddorder": "disks are tried in the order of their controllers",
    "nvram": "the firmware starts with its defaults",
    "cpuid.corespersocket": "each processor is a socket",
    "uuid.bios": "the machine gets another serial number (--vmware-tools keeps it) and UUID",
}

_IMAGES = ("", "disk", "scsi-harddisk", "ata-harddisk")


@dataclass(frozen=True)
class Hardware:
    """The hardware of a machine that QEMU can provide."""

    memory: int  #: MiB
    cpus: int
    disks: tuple[Disk, ...]
    cards: tuple[Card, ...]  #: the machine's cards, which it gets only if networking is enabled
    efi: bool
    omitted: tuple[str, ...]  #: a line for each part that is not carried over: its key, why


def translate(vmx: Vmx, folder: str) -> Hardware:
    """Translate ``vmx``; the names of its disks are relative to ``folder``.

    Raises VmxError if a value is invalid.
    """
    omitted: list[str] = []
    memory, cpus, efi = _memory(vmx), _cpus(vmx), _efi(vmx)
    disks, cards = tuple(_disks(vmx, folder, omitted)), tuple(_cards(vmx, omitted))
    return Hardware(memory, cpus, disks, cards, efi, (*omitted, *_ignored(vmx)))


def _memory(vmx: Vmx) -> int:
    size = vmx.number("memSize")
    size = _MEMORY if size is None else size
    if size < 1 or size % _MEMORY_STEP:
        raise vmx.error("memSize", f"expected MiB, a multiple of {_MEMORY_STEP}")
    return size


def _cpus(vmx: Vmx) -> int:
    number = vmx.number("numvcpus")
    if number is not None and number < 1:
        raise vmx.error("numvcpus", "expected a number from 1")
    return number or 1


def _efi(vmx: Vmx) -> bool:
    firmware = vmx.text("firmware").lower()
    if firmware not in ("", "bios", "efi"):
        raise vmx.error("firmware", "expected bios or efi")
    return firmware == "efi"


def _disks(vmx: Vmx, folder: str, omitted: list[str]) -> list[Disk]:
    slots = [found for key in vmx.values if (found := _DISK_KEY.fullmatch(key))]
    # Numbers are compared as numbers: "scsi0:10" follows "scsi0:2".
    order = ("scsi", "sata", "ide", "nvme")
    slots.sort(key=lambda found: (order.index(found[2]), int(found[3]), int(found[4])))
    disks: list[Disk] = []
    for found in slots:
        slot = f"{found[1]}:{found[4]}"
        if not vmx.boolean(found[0], False) or not vmx.boolean(f"{found[1]}.present", True):
            continue
        kind = vmx.text(f"{slot}.deviceType")
        if kind.lower() not in _IMAGES:
            omitted.append(f"{slot}: {kind} {vmx.text(f'{slot}.fileName')}".rstrip())
            continue
        mode = vmx.text(f"{slot}.mode").lower()
        if mode not in ("", "persistent", "independent-persistent"):
            omitted.append(f"{slot}.mode: {mode}: the guest's writes are kept")
        disks.append(
            Disk(_image(vmx, f"{slot}.fileName", folder), "vmdk", _bus(vmx, found, omitted))
        )
    if sum(disk.bus == "sata" for disk in disks) > SATA_PORTS:
        raise vmx.error("sata0.present", f"more than {SATA_PORTS} disks for the SATA controller")
    return disks


def _bus(vmx: Vmx, found: re.Match[str], omitted: list[str]) -> str:
    """Return a disk's controller in VMware, or "sata" if QEMU does not emulate it."""
    if found[2] in ("sata", "nvme"):
        return found[2]
    key = f"{found[1]}.virtualDev"
    model = vmx.text(key).lower() or "lsilogic"
    if found[2] == "scsi" and model in _SAME_SCSI:
        return _SAME_SCSI[model]
    subject = f"{key}: {model}" if found[2] == "scsi" else f"{found[1]}: IDE"
    line = f"{subject}: not in QEMU here, its disks are on SATA (AHCI)"
    if line not in omitted:
        omitted.append(line)
    return "sata"


def _image(vmx: Vmx, key: str, folder: str) -> str:
    name = vmx.text(key)
    if not name.lower().endswith(".vmdk"):
        raise vmx.error(key, "expected the name of a .vmdk file")
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        raise vmx.error(key, f"file {path} not found")
    if os.path.exists(f"{path}.lck"):
        raise vmx.error(key, f"locked by VMware ({path}.lck): power the machine off there")
    return path


def _cards(vmx: Vmx, omitted: list[str]) -> list[Card]:
    cards = []
    for key in sorted(vmx.values):
        found = _CARD_KEY.fullmatch(key)
        if not found or not vmx.boolean(key, False):
            continue
        model = vmx.text(f"{found[1]}.virtualDev").lower() or "flexible"
        if model not in _SAME_CARDS:
            omitted.append(f"{found[1]}.virtualDev: {model}: not in QEMU, replaced by an e1000")
        address = vmx.text(f"{found[1]}.address") or vmx.text(f"{found[1]}.generatedAddress")
        if not re.fullmatch(r"([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}|", address):
            raise vmx.error(f"{found[1]}.address", "expected six bytes like 00:50:56:01:02:03")
        cards.append(Card(_SAME_CARDS.get(model, "e1000"), address))
    return cards


def _ignored(vmx: Vmx) -> list[str]:
    lines = [f"{key}: {meaning}" for key, meaning in _IGNORED_KEYS.items() if vmx.text(key)]
    for key in vmx.values:
        found = _PRESENT.fullmatch(key)
        if found and not _PLATFORM.fullmatch(found[1]) and vmx.boolean(key, False):
            lines.append(f"{found[1]}{found[2] or ''}: not available to the guest here")
    return lines
