"""A virtual machine in a directory as VMware Workstation leaves it."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from pathlib import Path

import pytest

from vsockets.vm.guest_image import COMMAND_LINE

_PROGRAMS = ("qemu-img", "mkfs.fat", "mcopy", "syslinux")

#: Size in KiB of the disk, which is a FAT file system without partitions.
_DISK = 64 << 10

_BOOT = f"""\
SERIAL 0
DEFAULT linux
LABEL linux
  LINUX vmlinuz
  INITRD initrd
  APPEND {COMMAND_LINE}
"""

#: The file that VMware Workstation 17 writes for such a machine, in its order.
_VMX = """\
#!/usr/bin/vmware
.encoding = "UTF-8"
config.version = "8"
virtualHW.version = "21"
pciBridge0.present = "TRUE"
pciBridge4.present = "TRUE"
pciBridge4.virtualDev = "pcieRootPort"
pciBridge4.functions = "8"
vmci0.present = "TRUE"
hpet0.present = "TRUE"
nvram = "old.nvram"
virtualHW.productCompatibility = "hosted"
powerType.powerOff = "soft"
displayName = "An old machine"
guestOS = "debian12-64"
tools.syncTime = "FALSE"
sound.present = "TRUE"
sound.autoDetect = "TRUE"
sound.fileName = "-1"
numvcpus = "2"
memsize = "320"
scsi0.virtualDev = "{controller}"
scsi0.present = "TRUE"
scsi0:0.fileName = "old.vmdk"
scsi0:0.present = "TRUE"
sata0.present = "TRUE"
sata0:1.deviceType = "cdrom-raw"
sata0:1.fileName = "auto detect"
sata0:1.present = "TRUE"
usb.present = "TRUE"
ethernet0.connectionType = "nat"
ethernet0.addressType = "generated"
ethernet0.virtualDev = "vmxnet3"
ethernet0.present = "TRUE"
ethernet0.generatedAddress = "00:0C:29:11:22:33"
uuid.bios = "56 4d 11 22 33 44 55 66-77 88 99 aa bb 11 22 33"
vmci0.id = "{cid}"
vmci0.pciSlotNumber = "35"
scsi0:0.redo = ""
"""


def create_machine(folder: Path, kernel: Path, initrd: Path, cid: int, controller: str) -> Path:
    """Create the machine's files and return its ``.vmx`` file.

    The disk boots ``kernel`` through the BIOS.  Skips the test if the programs that create it are
    missing.
    """
    # mkfs.fat is in root's PATH only.
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt install qemu-utils dosfstools mtools syslinux")
    raw = folder / "disk"
    run("mkfs.fat", "-C", str(raw), str(_DISK))
    (folder / "syslinux.cfg").write_text(_BOOT)
    with gzip.open(folder / "initrd.gz", "wb", compresslevel=1) as packed:
        packed.write(initrd.read_bytes())
    for file, name in (
        *((folder / "syslinux.cfg", "syslinux.cfg"), (folder / "initrd.gz", "initrd")),
        (kernel, "vmlinuz"),
    ):
        run("mcopy", "-i", str(raw), str(file), f"::{name}")
    run("syslinux", "--install", str(raw))
    run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", str(raw), str(folder / "old.vmdk"))
    vmx = folder / "old.vmx"
    vmx.write_text(_VMX.format(cid=cid, controller=controller))
    return vmx


_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


def run(*command: str) -> None:
    """Run a program that must succeed."""
    done = subprocess.run(
        command, env={"PATH": _PATH}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
