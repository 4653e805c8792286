"""A virtual machine whose first process is systemd, to install the Debian package in.

Its system is a disk below ``~/.cache/vsockets``, made of Debian 13's packages: systemd, and what
apt would download for the package.  What a machine writes to the disk ends with it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from vm import downloads
from vm.machine import PATIENCE, Machine
from vsockets.testing import PrivateFabric
from vsockets.vm import guest_image
from vsockets.vm.apt import Unavailable

from .debian_package import DEPENDENCIES
from .debian_root import systemd_disk

RELEASE = "trixie"
PACKAGES = ("systemd-sysv", "dbus", "systemd-container", *DEPENDENCIES)

#: The folder of the package's two versions in the machine.
INSIDE = "/packages"

_AGENT = Path(__file__).parents[1] / "vm/agent.py"

_UNIT = """\
[Unit]
Description=Agent of the tests

[Service]
ExecStartPre=stty -F /dev/ttyS1 raw -echo
ExecStart=/bin/sh -c 'exec python3 -u -S /root/agent.py </dev/ttyS1 >/dev/ttyS1'
"""

#: The last commands of the initrd: go on with systemd, on the disk.  Without udev a console has no
#: device unit, which a getty would wait for; there are no modules.
_LAST = f"""\
set -e
insmod /modules/virtio_blk.ko
mkdir /new
mount -t ext4 /dev/vda /new
mv /packages /new{INSIDE}
mv /agent.py /new/root
mv /agent.service /new/etc/systemd/system
mkdir -p /new/etc/systemd/system/multi-user.target.wants
ln -s /etc/systemd/system/agent.service /new/etc/systemd/system/multi-user.target.wants
for unit in serial-getty@ getty@ systemd-modules-load; do
    ln -s /dev/null /new/etc/systemd/system/$unit.service
done
rm -f /new/etc/machine-id
echo 0123456789abcdef0123456789abcdef >/new/etc/machine-id
umount /proc /sys
mount -o move /dev /new/dev
exec switch_root /new /sbin/init </new/dev/console >/new/dev/console 2>&1
"""


class Done(NamedTuple):
    """The result of a command in the machine."""

    status: int
    output: str
    errors: str


class SystemdMachine:
    """A running machine that runs commands as root."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def run(self, *command: str, expect: int | None = 0) -> str:
        """Run a command, require its exit status, and return its standard output."""
        done = self.attempt(*command)
        assert expect is None or done.status == expect, done
        return done.output

    def attempt(self, *command: str) -> Done:
        """Run a command and return its result."""
        source = """
        import subprocess
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        result = done.returncode, done.stdout, done.stderr
        """
        return Done(*self.machine.run(source, 3 * PATIENCE, command=command))

    def shell(self, script: str, expect: int | None = 0) -> str:
        """Run a shell script as :meth:`run` does."""
        return self.run("sh", "-c", script, expect=expect)

    def property(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).strip()


@contextmanager
def running(folder: Path) -> Iterator[SystemdMachine]:
    """Run the machine, with the package's versions in :data:`INSIDE`.  Raises Unavailable."""
    kernel = downloads.kernel("backports")  # Debian 13 has the same version
    downloads.qemu()
    disk = systemd_disk(RELEASE, PACKAGES)
    packages = folder / "packages"
    packages.mkdir()
    build = (sys.executable, "-m", "environments.debian_package", "build", str(packages))
    done = subprocess.run(build, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    built = sorted(packages.glob("*.deb"))
    if done.returncode or not built:
        raise Unavailable(f"the package was not built: {done.stdout}{done.stderr}")
    inside = {f"/packages/{path.name}": path.read_bytes() for path in built}
    inside |= {"/agent.py": _AGENT.read_bytes(), "/agent.service": _UNIT.encode()}
    initrd = folder / "initrd"
    initrd.write_bytes(
        guest_image.build_initramfs(
            kernel, downloads.userland(), "virtio", _LAST, inside, ("virtio_blk",)
        )
    )
    drive = f"file={disk},format=raw,if=virtio,snapshot=on"
    with PrivateFabric() as fabric:
        machine = Machine(
            *(fabric, kernel, initrd, folder),
            device="virtio",
            memory=1024,
            arguments=("-drive", drive),
        )
        with machine:
            yield SystemdMachine(machine)
