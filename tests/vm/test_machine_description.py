"""QEMU's and libvirt's description of a machine, and the translation of a VMware machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from vsockets.vm.hardware import Hardware, translate
from vsockets.vm.qemu_args import (
    Card,
    Disk,
    MachineOptions,
    device_arguments,
    domain_xml,
    machine_arguments,
)
from vsockets.vmware import VmxError, parse_vmx

VMX = """\
.encoding = "UTF-8"
config.version = "8"
virtualHW.version = "21"
displayName = "web"
memSize = "256"
numvcpus = "2"
firmware = "bios"
nvram = "web.nvram"
scsi0.present = "TRUE"
scsi0.virtualDev = "pvscsi"
scsi0:0.present = "TRUE"
scsi0:0.fileName = "web.vmdk"
scsi0:10.present = "TRUE"
scsi0:10.fileName = "ten.vmdk"
scsi0:2.present = "TRUE"
scsi0:2.fileName = "two.vmdk"
scsi0:2.mode = "independent-nonpersistent"
scsi0:3.present = "FALSE"
scsi0:3.fileName = "absent.vmdk"
sata0.present = "TRUE"
sata0:1.present = "TRUE"
sata0:1.deviceType = "cdrom-image"
sata0:1.fileName = "linux.iso"
ide1:0.present = "TRUE"
ide1:0.fileName = "old.vmdk"
ethernet0.present = "TRUE"
ethernet0.virtualDev = "vmxnet3"
ethernet0.generatedAddress = "00:0c:29:01:02:03"
ethernet1.present = "FALSE"
usb.present = "TRUE"
floppy0.present = "FALSE"
sound.present = "true"
vmci0.present = "TRUE"
vmci0.id = "-1234567890"
vmci0.pciSlotNumber = "35"
tools.syncTime = "FALSE"
"""

Read = Callable[[str], Hardware]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """A function that translates a ``.vmx`` file in a directory with some disks."""
    for name in ("web", "ten", "two", "old"):
        (tmp_path / f"{name}.vmdk").touch()

    def read(text: str) -> Hardware:
        return translate(parse_vmx(text.encode(), "web.vmx"), str(tmp_path))

    return read


class TestHardware:
    def test_translated_and_omitted_hardware(self, read: Read, tmp_path: Path) -> None:
        found = read(VMX)
        assert (found.memory, found.cpus, found.efi) == (256, 2, False)
        assert found.disks == (
            Disk(f"{tmp_path}/web.vmdk", "vmdk", "pvscsi"),
            Disk(f"{tmp_path}/two.vmdk", "vmdk", "pvscsi"),
            Disk(f"{tmp_path}/ten.vmdk", "vmdk", "pvscsi"),
            Disk(f"{tmp_path}/old.vmdk", "vmdk", "sata"),
        )
        assert found.cards == (Card("vmxnet3", "00:0c:29:01:02:03"),)
        assert [line.partition(": ")[0] for line in found.omitted] == [
            "scsi0:2.mode",
            "sata0:1",
            "ide1",
            "nvram",
            "usb",
            "sound",
        ]

    def test_defaults_of_an_empty_file(self, read: Read) -> None:
        assert read("") == Hardware(32, 1, (), (), False, ())

    @pytest.mark.parametrize("model", ["", "lsilogic", "buslogic"])
    def test_controllers_missing_in_qemu(self, read: Read, model: str) -> None:
        disks = "".join(
            f'scsi0:{n}.present = "TRUE"\nscsi0:{n}.fileName = "web.vmdk"\n' for n in (0, 1)
        )
        found = read(f'scsi0.virtualDev = "{model}"\n{disks}')
        assert [disk.bus for disk in found.disks] == ["sata", "sata"]
        (line,) = found.omitted
        assert line.startswith(f"scsi0.virtualDev: {model or 'lsilogic'}: ")

    def test_efi(self, read: Read) -> None:
        assert read('firmware = "EFI"').efi

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ('memSize = "0"', "memSize: '0', expected MiB, a multiple of 4"),
            ('memSize = "6"', "memSize: '6', expected MiB"),
            ('numvcpus = "0"', "numvcpus: '0', expected a number from 1"),
            ('firmware = "coreboot"', "firmware: 'coreboot', expected bios or efi"),
            ('nvme0:0.fileName = "no.vmdk"', "'no.vmdk', file "),
            ('nvme0:0.fileName = "x.vhd"', "'x.vhd', expected the name of a .vmdk file"),
            ("", "nvme0:0.fileName: missing, expected the name of a .vmdk file"),
        ],
    )
    def test_mistakes(self, read: Read, line: str, problem: str) -> None:
        with pytest.raises(VmxError) as refused:
            read(f'{line}\nnvme0:0.present = "TRUE"')
        assert problem in str(refused.value)

    def test_too_many_disks_of_a_controller(self, read: Read) -> None:
        place = 'sata0:{0}.present = "TRUE"\nsata0:{0}.fileName = "web.vmdk"\n'
        with pytest.raises(VmxError, match="more than 6 disks"):
            read("".join(place.format(number) for number in range(7)))

    def test_disk_locked_by_vmware(self, read: Read, tmp_path: Path) -> None:
        (tmp_path / "web.vmdk.lck").mkdir()
        with pytest.raises(VmxError, match="locked"):
            read(VMX)

    def test_card_missing_in_qemu(self, read: Read) -> None:
        found = read('ethernet0.present = "TRUE"')
        assert found.cards == (Card("e1000"),)
        assert found.omitted == (
            "ethernet0.virtualDev: flexible: not in QEMU, replaced by an e1000",
        )


class TestArguments:
    def test_memory_is_shared_with_the_device(self) -> None:
        options = machine_arguments(MachineOptions("vmci", 256), "/run/vm5")
        assert options[options.index("-m") + 1] == "256M"
        assert "memory-backend-memfd,id=mem,size=256M,share=on" in options
        assert any("memory-backend=mem" in word for word in options)

    @pytest.mark.parametrize(
        ("accelerators", "cpu"), [(("tcg",), "max,erms=off,fsrm=off"), (("kvm", "tcg"), "max")]
    )
    def test_an_emulated_processor_has_no_fast_strings(
        self, accelerators: tuple[str, ...], cpu: str
    ) -> None:
        machine = MachineOptions("vmci", 256, accelerators=accelerators)
        options = machine_arguments(machine, "/run/vm5")
        assert options[options.index("-cpu") + 1] == cpu

    def test_commas_in_names_are_quoted(self) -> None:
        options = machine_arguments(MachineOptions("virtio", 256, name="a,b"), "/run/a,b")
        assert options[options.index("-name") + 1] == "a,,b"
        assert "socket,id=vsock,path=/run/a,,b" in options

    def test_a_machine_like_vmwares(self) -> None:
        machine = MachineOptions("vmci", 256, vmware_serial="VMware-56 4d, 1")
        options = machine_arguments(machine, "/run/vm5")
        assert options[options.index("-cpu") + 1].endswith(",kvm=off,tcg-cpuid=off")
        assert options[options.index("-smbios") + 1] == (
            "type=1,manufacturer=VMware,, Inc.,product=VMware Virtual Platform,"
            "serial=VMware-56 4d,, 1"
        )

    def test_the_credential_of_systemd_is_a_string_of_smbios(self) -> None:
        machine = MachineOptions("vmci", 256, notify_socket="vsock:2:1,2")
        options = machine_arguments(machine, "/run/vm5")
        assert options[options.index("-smbios") + 1] == (
            "type=11,value=io.systemd.credential:vmm.notify_socket=vsock:2:1,,2"
        )

    def test_disks_keep_their_order(self) -> None:
        disks = [("a,b", "virtio"), ("s0", "sata"), ("p0", "pvscsi"), ("s1", "sata")]
        disks += [("p1", "pvscsi"), ("n", "nvme"), ("l", "lsisas1068")]
        machine = MachineOptions("vmci", 256, disks=tuple(Disk(a, "vmdk", b) for a, b in disks))
        options = machine_arguments(machine, "/run/vm5")
        devices = [word for before, word in pairwise(options) if before == "-device"]
        assert devices[1:] == [
            '{"driver": "virtio-blk-pci", "drive": "disk0", "bootindex": 0}',
            '{"driver": "ide-hd", "drive": "disk1", "bootindex": 1, "bus": "ide.0"}',
            "pvscsi,id=pvscsi",
            '{"driver": "scsi-hd", "drive": "disk2", "bootindex": 2, "bus": "pvscsi.0", '
            '"scsi-id": 0}',
            '{"driver": "ide-hd", "drive": "disk3", "bootindex": 3, "bus": "ide.1"}',
            '{"driver": "scsi-hd", "drive": "disk4", "bootindex": 4, "bus": "pvscsi.0", '
            '"scsi-id": 1}',
            '{"driver": "nvme", "drive": "disk5", "bootindex": 5, "serial": "disk5"}',
            "mptsas1068,id=lsisas1068",
            '{"driver": "scsi-hd", "drive": "disk6", "bootindex": 6, "bus": "lsisas1068.0", '
            '"scsi-id": 0}',
        ]
        files = [json.loads(word)["file"]["filename"] for word in options if '"node-name"' in word]
        assert files == [path for path, _ in disks]

    def test_network_only_with_a_card(self) -> None:
        assert not [
            word for word in machine_arguments(MachineOptions("vmci", 256), "/s") if "net" in word
        ]
        options = machine_arguments(
            MachineOptions("vmci", 256, cards=(Card("e1000", "00:50:56:01:02:03"),)), "/s"
        )
        assert options[-4:] == [
            *("-netdev", "user,id=net0"),
            *("-device", "e1000,netdev=net0,mac=00:50:56:01:02:03"),
        ]


@pytest.mark.parametrize("device", ["vmci", "virtio"])
def test_domain_xml_of_libvirt(device: str) -> None:
    domain = ElementTree.fromstring(domain_xml(device, "/run/a&b"))
    access = domain.find("memoryBacking/access")
    assert access is not None
    assert access.get("mode") == "shared"
    commandline = domain.find("{http://libvirt.org/schemas/domain/qemu/1.0}commandline")
    assert commandline is not None
    assert [one.get("value") for one in commandline] == device_arguments(device, "/run/a&b")
