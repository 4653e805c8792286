"""QEMU's arguments for a virtual machine, also as libvirt's XML."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from xml.etree import ElementTree

PROGRAM = "qemu-system-x86_64"

#: Timeout of the device's replies to QEMU, in milliseconds; QEMU then gives the device up.
_REPLY_TIMEOUT_MS = 60_000

#: The buses for disks: the controller to add, and the disk's own device.  "sata" is q35's built-in
#: controller; "nvme" and "virtio" have one controller per disk.
_CONTROLLERS = {
    "virtio": (None, "virtio-blk-pci"),
    "nvme": (None, "nvme"),
    "sata": (None, "ide-hd"),
    "pvscsi": ("pvscsi", "scsi-hd"),
    "lsisas1068": ("mptsas1068", "scsi-hd"),
}
BUSES = tuple(_CONTROLLERS)

#: Disks on q35's built-in controller.
SATA_PORTS = 6

FORMATS = ("qcow2", "raw", "vmdk")

#: The virtio device, in a slot that supports hot unplugging.
VIRTIO_DEVICE = {"driver": "vhost-user-vsock-pci", "id": "dev", "chardev": "vsock", "bus": "slot0"}


@dataclass(frozen=True)
class Disk:
    """A disk image file and its controller."""

    path: str
    format: str  #: one of FORMATS
    bus: str = "virtio"  #: one of BUSES


@dataclass(frozen=True)
class Card:
    """A network card on QEMU's user-mode network (NAT)."""

    model: str = "virtio-net-pci"
    address: str = ""  #: its MAC address; empty: chosen by QEMU


@dataclass(frozen=True)
class MachineOptions:
    """The description of a virtual machine."""

    device: str  #: vmci or virtio
    memory: int  #: MiB
    cpus: int = 1
    name: str = ""
    accelerators: tuple[str, ...] = ("tcg",)  #: in order of preference
    kernel: str = ""
    initrd: str = ""
    append: str = ""  #: the kernel's command line
    firmware: str = ""  #: path of a UEFI firmware; empty: QEMU's BIOS
    disks: tuple[Disk, ...] = ()
    cards: tuple[Card, ...] = ()
    #: a serial number for VMware Tools, which then take the machine for VMware's; empty: no such
    #: machine
    vmware_serial: str = ""
    #: address to which the guest's systemd reports its start; empty: it does not
    notify_socket: str = ""


#: The credential of systemd.system-credentials(7), as SMBIOS has it.
_NOTIFY_CREDENTIAL = "io.systemd.credential:vmm.notify_socket"

#: What systemd-detect-virt, cloud-init and the tools' unit look for.
_VMWARE_SYSTEM = "type=1,manufacturer=VMware,, Inc.,product=VMware Virtual Platform"


def machine_arguments(machine: MachineOptions, device_socket: str) -> list[str]:
    """Return all arguments except those of the console and the monitor.

    ``device_socket`` is the path at which the device's process listens.
    """
    args = ["-nodefaults", "-no-user-config", "-display", "none"]
    if machine.name:
        args += ["-name", _quoted(machine.name)]
    for accelerator in machine.accelerators:
        args += ["-accel", accelerator]
    # With one possible processor, QEMU 11.1 emulates LOCK without a lock: the guest's barriers then
    # do not order its accesses for the device's process, and a wake-up may be lost.
    processors = f"{machine.cpus},maxcpus={max(machine.cpus, 2)}"
    args += ["-cpu", _cpu(machine), "-smp", processors, "-m", f"{machine.memory}M"]
    if machine.vmware_serial:
        args += ["-smbios", f"{_VMWARE_SYSTEM},serial={_quoted(machine.vmware_serial)}"]
    if machine.notify_socket:
        value = f"{_NOTIFY_CREDENTIAL}={_quoted(machine.notify_socket)}"
        args += ["-smbios", f"type=11,value={value}"]
    # Shared, because the device's process accesses the guest's memory.
    args += ["-object", f"memory-backend-memfd,id=mem,size={machine.memory}M,share=on"]
    # Without graphics, the BIOS and boot loaders use the console.
    args += ["-machine", "q35,memory-backend=mem,graphics=off"]
    if machine.firmware:
        args += ["-bios", machine.firmware]
    for option in ("kernel", "initrd", "append"):
        value = getattr(machine, option)
        if value:
            args += [f"-{option}", value]
    args += device_arguments(machine.device, device_socket)
    args += _disks(machine.disks)
    for number, card in enumerate(machine.cards):
        args += ["-netdev", f"user,id=net{number}"]
        address = f",mac={card.address}" if card.address else ""
        args += ["-device", f"{card.model},netdev=net{number}{address}"]
    return args


def _cpu(machine: MachineOptions) -> str:
    cpu = "max"
    if machine.accelerators == ("tcg",):
        # Without fast strings Linux copies and clears memory by words.  QEMU emulates a fast string
        # byte by byte: 4 ns each, 2 ms for the queues of a VMCI connect.
        cpu += ",erms=off,fsrm=off"
    if machine.vmware_serial:
        # VMware Tools end at once under a hypervisor that names itself another one.
        cpu += ",kvm=off,tcg-cpuid=off"
    return cpu


def device_arguments(device: str, path: str) -> list[str]:
    """Return the arguments of a vSockets device whose process listens at ``path``."""
    if device == "virtio":
        return [
            *("-chardev", f"socket,id={VIRTIO_DEVICE['chardev']},path={_quoted(path)}"),
            *("-device", f"pcie-root-port,id={VIRTIO_DEVICE['bus']},slot=1"),
            *("-device", json.dumps(VIRTIO_DEVICE)),
        ]
    vfio = {
        "driver": "vfio-user-pci",
        "socket": {"type": "unix", "path": path},
        "x-no-posted-writes": True,
        "x-msg-timeout": _REPLY_TIMEOUT_MS,
        "rombar": 0,
    }
    return ["-device", json.dumps(vfio)]


def _disks(disks: tuple[Disk, ...]) -> Iterator[str]:
    controllers: dict[str, int] = {}
    for number, disk in enumerate(disks):
        controller, device = _CONTROLLERS[disk.bus]
        node = f"disk{number}"
        file = {"driver": "file", "filename": disk.path}
        yield from (
            "-blockdev",
            json.dumps({"driver": disk.format, "node-name": node, "file": file}),
        )
        if controller and disk.bus not in controllers:
            yield from ("-device", f"{controller},id={disk.bus}")
        index = controllers[disk.bus] = controllers.get(disk.bus, -1) + 1
        options: dict[str, object] = {"driver": device, "drive": node, "bootindex": number}
        if disk.bus == "sata":
            options["bus"] = f"ide.{index}"
        elif controller:
            options |= {"bus": f"{disk.bus}.0", "scsi-id": index}
        elif disk.bus == "nvme":
            options["serial"] = node
        yield from ("-device", json.dumps(options))


def _quoted(value: str) -> str:
    """Return ``value`` with commas doubled, as QEMU's lists of options require."""
    return value.replace(",", ",,")


_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"


def domain_xml(device: str, path: str) -> str:
    """Return libvirt's XML for a vSockets device whose process listens at ``path``.

    libvirt has no element for these devices, so the XML passes arguments to QEMU, which needs the
    namespace at the domain element.  The XML also shares the guest's memory with the device.
    """
    ElementTree.register_namespace("qemu", _NAMESPACE)
    domain = ElementTree.Element("domain", {"type": "kvm"})
    memory = ElementTree.SubElement(domain, "memoryBacking")
    ElementTree.SubElement(memory, "source", {"type": "memfd"})
    ElementTree.SubElement(memory, "access", {"mode": "shared"})
    command = ElementTree.SubElement(domain, f"{{{_NAMESPACE}}}commandline")
    for argument in device_arguments(device, path):
        ElementTree.SubElement(command, f"{{{_NAMESPACE}}}arg", {"value": argument})
    ElementTree.indent(domain)
    return ElementTree.tostring(domain, encoding="unicode")
