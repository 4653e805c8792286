"""``make test-guest``: guests with systemd, VMware Tools, cloud-init, sshd and qemu-ga.

They are a Debian 13 with the VMCI device, and then a Debian 12 with the virtio device.  As this
takes minutes under emulation, pytest finds these tests only by their name.  They are in the order
of a guest's life, and need those before them.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vsockets
from vsockets.testing import PrivateFabric, wait_until
from vsockets.vm.apt import Unavailable

from .systemd_guest import BOOT, SystemdGuest, block

pytestmark = pytest.mark.timeout(1000)

CID = 77
CID_OF_DEBIAN_12 = 78

#: What cloud-init finds in guestinfo.userdata; with few modules, as each takes long to load.
USERDATA = """\
#cloud-config
disable_root: false
users: [{{name: root, ssh_authorized_keys: ["{key}"]}}]
write_files: [{{path: /root/from-userdata, content: found}}]
cloud_init_modules: [write-files, set-hostname, users-groups, ssh]
cloud_config_modules: []
cloud_final_modules: []
"""

RPCTOOL = "usr/local/bin/vmware-rpctool"

ECHO_SOCKET = """\
[Socket]
ListenStream=vsock::5000
Accept=yes
"""
ECHO_SERVICE = """\
[Service]
ExecStart=/bin/cat
StandardInput=socket
StandardOutput=socket
"""


class Host:
    """The host's side of a guest: the commands of ``vsock``, and ssh."""

    def __init__(self, fabric: PrivateFabric, folder: Path) -> None:
        self.fabric = fabric
        self._program = [sys.executable, "-m", "vsockets.cli", "--dir", str(fabric.folder)]
        self.folder = folder
        key = str(folder / "user")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        shipped = self("ssh-proxy", "--config")
        (folder / "ssh_config").write_text(
            shipped.replace("ProxyCommand vsock ", f"ProxyCommand {' '.join(self._program)} ")
            + f"Host *\nIdentityFile {key}\nUserKnownHostsFile {folder}/known\n"
            "StrictHostKeyChecking accept-new\nBatchMode yes\n"
        )

    def __call__(self, *arguments: object) -> str:
        """Run a command that must succeed; return its output."""
        command = [*self._program, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done
        return done.stdout

    def serve_tools(self) -> subprocess.Popen[str]:
        """Start the service of VMware Tools."""
        command = [*self._program, "guestinfo", "serve", "--state", str(self.folder / "state")]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        assert "serving VMware Tools" in process.stderr.readline()
        return process

    def tools(self, cid: int = CID) -> dict[str, Any]:
        """Return what a guest's tools claim, and whether they run."""
        guests = json.loads(self("guestinfo", "ls", "--json"))
        (found,) = (one for one in guests if one["cid"] == cid)
        assert isinstance(found, dict)
        return found

    def userdata(self) -> str:
        """Return the user data of a guest, with this host's key."""
        return USERDATA.format(key=(self.folder / "user.pub").read_text().strip())

    def ssh(self, command: str) -> str:
        """Run a command in the guest by ssh."""
        words = ["ssh", "-F", str(self.folder / "ssh_config"), f"root@vsock/{CID}", command]
        done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done
        return done.stdout


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    if not all(map(shutil.which, ("gcc", "ssh", "ssh-keygen"))):
        pytest.skip("needs gcc, ssh and ssh-keygen")
    with (
        tempfile.TemporaryDirectory(prefix="sg-", dir="/tmp") as name,
        PrivateFabric() as fabric,
    ):
        host = Host(fabric, Path(name))
        service = host.serve_tools()
        yield host
        service.terminate()
        service.communicate(timeout=60)


@pytest.fixture(scope="module")
def guest(host: Host) -> Iterator[SystemdGuest]:
    release = "trixie"
    units = "etc/systemd/system"
    files: dict[str, str | bytes] = {
        f"{units}/qemu-guest-agent-vsock.service": block(
            "vm.md", "# /etc/systemd/system/qemu-guest-agent-vsock.service"
        ),
        f"{units}/echo.socket": ECHO_SOCKET,
        f"{units}/echo@.service": ECHO_SERVICE,
    }
    folder = host.folder / release
    folder.mkdir()
    try:
        guest = SystemdGuest(
            host.fabric,
            folder,
            release,
            *("--wait-ready", "--grace", "300"),
            device="vmci",
            cid=CID,
            userdata=host.userdata(),
            files=files,
            enabled="qemu-guest-agent-vsock.service echo.socket",
        )
    except Unavailable as error:
        pytest.skip(str(error))
    with guest:
        yield guest


@pytest.fixture(scope="module")
def debian_12(host: Host) -> Iterator[SystemdGuest]:
    """A guest with the ``vmware-rpctool`` of the documentation, and with its module for virtio."""
    folder = host.folder / "bookworm"
    folder.mkdir()
    try:
        guest = SystemdGuest(
            host.fabric,
            folder,
            "bookworm",
            *("--grace", "300"),
            device="virtio",
            cid=CID_OF_DEBIAN_12,
            userdata=host.userdata(),
            files={RPCTOOL: block("guestinfo.md", "#!/bin/sh\n# /usr/local/bin/vmware-rpctool")},
        )
    except Unavailable as error:
        pytest.skip(str(error))
    with guest:
        yield guest


def wait_for(condition: Callable[[], object], what: str) -> None:
    wait_until(condition, what, BOOT)


def wait_for_unit(guest: SystemdGuest, unit: str) -> None:
    script = f"systemctl is-active {unit} || true"
    wait_for(lambda: guest.shell(script) == "active\n", f"{unit} to be active")


def check_cloud_init(guest: SystemdGuest, host: Host, cid: int) -> None:
    assert guest.shell("cat /root/from-userdata; hostname") == "foundmoved\n"
    assert "DataSourceVMware" in guest.shell("cat /var/lib/cloud/instance/datasource")
    assert host("guestinfo", "get", cid, "userdata") == "---\n"


def test_cloud_init_reads_guestinfo(guest: SystemdGuest, host: Host) -> None:
    """Metadata and user data arrive, and the guest has redacted the latter."""
    # 2 is for its warning that Debian's vmware-rpctool has failed, before it used vmtoolsd.
    guest.shell("cloud-init status --wait || [ $? = 2 ]")
    check_cloud_init(guest, host, CID)


def test_the_guest_reports_its_start(guest: SystemdGuest) -> None:
    wait_for(lambda: "vsock: the guest is ready (" in guest.log, "READY=1")
    assert "vsock: guest: active: multi-user.target\n" in guest.log
    assert "vsock: guest: Ready.\n" in guest.log


def test_a_socket_unit_of_vsockets(guest: SystemdGuest, host: Host) -> None:
    wait_for_unit(guest, "echo.socket")
    with vsockets.create_connection((CID, 5000), 60, context=guest.host) as sock:
        sock.sendall(b"hello")
        assert sock.recv(100) == b"hello"


def test_ssh_by_the_generator_of_systemd(guest: SystemdGuest, host: Host) -> None:
    assert "system-sshd.slice/sshd@" in host.ssh("cat /proc/self/cgroup")


def test_programs_and_files_by_qemu_ga(guest: SystemdGuest, host: Host) -> None:
    wait_for_unit(guest, "qemu-guest-agent-vsock.service")
    assert host("vm", "exec", CID, "--", "hostname") == "moved\n"
    host("vm", "copy", sys.executable, f"{CID}:/root/copied")
    host("vm", "copy", f"{CID}:/root/copied", host.folder / "copied")
    assert (host.folder / "copied").read_bytes() == Path(sys.executable).read_bytes()


def test_the_tools_are_told_of_suspend_and_resume(guest: SystemdGuest, host: Host) -> None:
    wait_for(lambda: host.tools()["running"], "the tools to run")
    host("context", "suspend", CID)
    assert host.tools()["claims"]["state"] == "suspending"
    assert guest.monitor("query-status")["status"] == "paused"
    host("context", "resume", CID)
    wait_for(lambda: host.tools()["claims"]["state"] == "resumed", "the scripts for the resume")
    assert host.tools()["running"]


def test_a_reboot_by_the_tools(guest: SystemdGuest, host: Host) -> None:
    host("vm", "reboot", CID)
    guest.wait_for_boot()
    wait_for(lambda: host.tools()["running"], "the tools to run")


def test_a_reboot_by_qemu_ga(guest: SystemdGuest, host: Host) -> None:
    wait_for_unit(guest, "qemu-guest-agent-vsock.service")
    guest.shell("systemctl stop open-vm-tools")
    wait_for(lambda: not host.tools()["running"], "the tools to end")
    host("vm", "reboot", CID)
    guest.wait_for_boot()
    wait_for(lambda: host.tools()["running"], "the tools to run")


def halt(guest: SystemdGuest) -> None:
    """End the command by SIGTERM, which lets the guest's systemd shut down."""
    assert guest.qemu is not None
    guest.qemu.terminate()
    assert guest.qemu.wait(BOOT) == 128 + signal.SIGTERM
    assert "pressing the power button" not in guest.log
    assert "reboot: Power down" in guest.console


def test_a_halt_by_the_tools(guest: SystemdGuest) -> None:
    halt(guest)


def test_debian_12_over_virtio(debian_12: SystemdGuest, host: Host) -> None:
    """Tools find vSockets by datagrams only, and this cloud-init uses vmware-rpctool only."""
    cid = CID_OF_DEBIAN_12
    debian_12.shell("cloud-init status --wait")
    check_cloud_init(debian_12, host, cid)
    wait_for(lambda: host.tools(cid)["running"], "the tools to run")
    host("vm", "reboot", cid)
    debian_12.wait_for_boot()
    wait_for(lambda: host.tools(cid)["running"], "the tools to run again")
    halt(debian_12)
