"""Guests whose first process is systemd, with their distribution's VMware Tools and cloud-init.

Their systems are disks below ``~/.cache/vsockets``.  What a guest writes to its disk ends with it.
Programs and units that an administrator adds to a guest are those of the documentation.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from vm import downloads
from vm.launched import Launched
from vsockets.testing import PrivateFabric
from vsockets.vm import guest_image

from .debian_root import systemd_disk

PACKAGES = (
    *("systemd-sysv", "dbus", "udev", "python3", "openssh-server", "cloud-init", "open-vm-tools"),
    *("qemu-guest-agent", "iproute2"),
)

#: The kernel that is booted with a release.
KERNELS = {"bookworm": "stable", "trixie": "newest"}

#: Seconds for systemd, cloud-init and the tools to start under emulation.
BOOT = 900.0

_DOCS = Path(__file__).parents[2] / "docs"
_AGENT = Path(__file__).parents[1] / "vm/agent.py"

_AGENT_UNIT = """\
[Unit]
Description=Agent of the tests
DefaultDependencies=no
After=systemd-remount-fs.service

[Service]
ExecStartPre=stty -F /dev/ttyS1 raw -echo
ExecStart=/bin/sh -c 'exec python3 -u -S /root/agent.py </dev/ttyS1 >/dev/ttyS1'
"""

_UNITS = "etc/systemd/system"

#: The last commands of the initrd: add files to the system on the disk, and go on with it.
_LAST = """\
set -e
for module in {modules}; do
    [ -d /sys/module/$module ] || insmod /modules/$module.ko
done
mkdir /new
mount -t ext4 /dev/vda /new
cp -a /inside/. /new/
mkdir -p /new/{units}/multi-user.target.wants
for unit in {enabled}; do ln -sf /{units}/$unit /new/{units}/multi-user.target.wants/; done
for unit in serial-getty@ getty@ systemd-modules-load; do
    ln -sf /dev/null /new/{units}/$unit.service
done
rm -f /new/etc/machine-id
echo 0123456789abcdef0123456789abcdef >/new/etc/machine-id
umount /proc /sys
mount -o move /dev /new/dev
exec switch_root /new /sbin/vmware-init </new/dev/console >/new/dev/console 2>&1
"""

_VMX = """\
config.version = "8"
virtualHW.version = "21"
displayName = "moved"
memsize = "1024"
numvcpus = "2"
vmci0.present = "TRUE"
vmci0.id = "{cid}"
"""


def block(page: str, beginning: str) -> str:
    """Return the block of code of a page of the documentation that begins so."""
    text = (_DOCS / page).read_text()
    found = re.search(rf"^```\w+\n({re.escape(beginning)}.*?)^```$", text, re.M | re.S)
    assert found, f"{page} has no block that begins with {beginning!r}"
    return found[1]


def compiled(source: str, folder: Path) -> bytes:
    """Return a static program."""
    (folder / "program.c").write_text(source)
    command = ["gcc", "-static", "-o", str(folder / "program"), str(folder / "program.c")]
    subprocess.run(command, check=True)
    return (folder / "program").read_bytes()


def initrd(release: str, device: str, files: Mapping[str, str | bytes], enabled: str) -> bytes:
    """Return an initrd that adds ``files``, enables units and starts the system."""
    kernel = downloads.kernel(KERNELS[release])
    inside = {f"/inside/{name}": data for name, data in files.items()}
    encoded = {name: one.encode() if isinstance(one, str) else one for name, one in inside.items()}
    # Over virtio, VMware Tools need the datagrams that VMCI's module has without a VMCI device.
    tools = ("vmw_vsock_vmci_transport",) if device == "virtio" else ()
    modules = " ".join(kernel.modules("virtio_pci", "virtio_blk", *tools))
    last = _LAST.format(modules=modules, units=_UNITS, enabled=enabled)
    return guest_image.build_initramfs(
        kernel, downloads.userland(), device, last, encoded, ("virtio_pci", "virtio_blk", *tools)
    )


class SystemdGuest(Launched):
    """A guest that ``vsock vm run --vmx`` runs."""

    def __init__(
        self,
        fabric: PrivateFabric,
        folder: Path,
        release: str,
        *options: str,
        device: str,
        cid: int,
        userdata: str,
        files: Mapping[str, str | bytes],
        enabled: str = "",
    ) -> None:
        """``userdata`` is cloud-init's; ``files`` are added to the guest, and units enabled."""
        self._disk = systemd_disk(release, PACKAGES)
        (folder / "guest.vmx").write_text(_VMX.format(cid=cid) + _guestinfo(userdata))
        added: dict[str, str | bytes] = {
            "root/agent.py": _AGENT.read_bytes(),
            f"{_UNITS}/agent.service": _AGENT_UNIT,
            "usr/sbin/vmware-init": compiled(block("guestinfo.md", "/* cc -static"), folder),
            **files,
        }
        (folder / "initrd").write_bytes(
            initrd(release, device, added, f"agent.service {enabled}".strip())
        )
        super().__init__(
            fabric,
            downloads.kernel(KERNELS[release]),
            folder / "initrd",
            folder,
            *("--vmx", str(folder / "guest.vmx"), "--vmware-tools", *options),
            cid=cid,
            device=device,
        )

    def _control_channels(self) -> list[str]:
        drive = f"file={self._disk},format=raw,if=virtio,snapshot=on"
        return [*super()._control_channels(), "-drive", drive]

    def wait_for_boot(self) -> None:
        """Wait until the agent runs, which systemd starts."""
        self._wait_for(0, BOOT)

    def shell(self, script: str, timeout: float = BOOT) -> str:
        """Run a shell script that must succeed, and return its output."""
        source = """
        import subprocess
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
        result = done.returncode, done.stdout, done.stderr
        """
        status, output, errors = self.run(source, timeout, script=script)
        assert status == 0, (script, output, errors)
        return str(output)


def _guestinfo(userdata: str) -> str:
    metadata = {"instance-id": "moved-1", "local-hostname": "moved", "redact": ["userdata"]}
    lines = []
    for name, text in (("metadata", json.dumps(metadata)), ("userdata", userdata)):
        value = base64.b64encode(text.encode()).decode()
        lines.append(f'guestinfo.{name} = "{value}"\nguestinfo.{name}.encoding = "base64"\n')
    return "".join(lines)
