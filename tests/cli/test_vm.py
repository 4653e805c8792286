"""``vsock vm``: invalid options, and the commands it prints."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from vsockets.vm.qemu import REQUIREMENTS, probe

from .vsock import Vsock

OLD = """\
#!/bin/sh
echo "QEMU emulator version 7.2.15 (Debian 1:7.2+dfsg-7)"
"""
BUILT_WITHOUT = """\
#!/bin/sh
[ "$1" = --version ] && echo "QEMU emulator version 10.2.0" ||
    echo "$0: -device $2: Device '${2%,help}' not found" >&2
"""
#: Output of Debian 12 to 14's QEMU for all drivers, beside another QEMU's modules.
ABORTING = """\
#!/bin/sh
case "$*" in
    --version) echo "QEMU emulator version 10.2.0" ;;
    *,help) echo "a module of another QEMU" >&2; kill -ABRT $$ ;;
    *help) kill -ABRT $$ ;;
esac
"""
BROKEN = """\
#!/bin/sh
echo "$0: error while loading shared libraries: libpixman-1.so.0" >&2
exit 127
"""


#: A command that runs a machine with something to boot.
RUN = ("vm", "run", "--accel", "tcg", "--kernel", "/dev/null")


@pytest.fixture
def qemu(tmp_path: Path) -> Path:
    """Write an executable script."""
    path = tmp_path / "qemu-system-x86_64"
    path.touch(0o755)
    return path


class TestWhichQemu:
    def test_too_old_is_not_broken(self, vsock: Vsock, qemu: Path) -> None:
        qemu.write_text(OLD)
        said = vsock.fails(*RUN, "--qemu", qemu)
        assert "is QEMU 7.2, too old for the vmci device (vfio-user-pci came with 10.1)" in said
        assert "apt install" in said
        assert "--device virtio" in said

    def test_built_without_the_device(self, vsock: Vsock, qemu: Path) -> None:
        qemu.write_text(BUILT_WITHOUT)
        said = vsock.fails(*RUN, "--qemu", qemu)
        assert "QEMU 10.2, was built without vfio-user-pci" in said

    @pytest.mark.parametrize("device", ["vmci", "virtio"])
    def test_an_aborted_query_is_not_a_refusal(self, vsock: Vsock, qemu: Path, device: str) -> None:
        qemu.write_text(ABORTING)
        said = vsock.fails(*RUN, "--qemu", qemu, "--device", device)
        assert "does not work; -device " in said
        assert said.endswith("a module of another QEMU (killed by signal 6 (Aborted))")
        assert "built without" not in said

    def test_only_the_device_is_asked_for(self, tmp_path: Path, qemu: Path) -> None:
        """Modules of another QEMU, for other devices, are not loaded."""
        qemu.write_text(
            ABORTING.replace(
                'echo "a module of another QEMU" >&2; kill -ABRT $$', 'echo "${2%,help} options:"'
            )
        )
        for device in REQUIREMENTS:
            probe(str(qemu)).require(device)

    def test_broken_is_not_too_old(self, vsock: Vsock, qemu: Path) -> None:
        qemu.write_text(BROKEN)
        said = vsock.fails(*RUN, "--qemu", qemu)
        assert "does not work" in said
        assert "libpixman-1.so.0" in said
        assert "too old" not in said

    def test_there_is_none(self, vsock: Vsock) -> None:
        said = vsock.fails(*RUN, "--qemu", "/nowhere/qemu")
        assert said == "program not found: /nowhere/qemu"


def test_mistakes(vsock: Vsock, tmp_path: Path) -> None:
    (tmp_path / "disk.vdi").touch()
    vmx = tmp_path / "a.vmx"
    vmx.write_text('virtualHW.version = "4"\n')
    vsock.fail(
        ("vm run --kernel /nowhere", 2, "'/nowhere': no such file"),
        ("vm run --disk /nowhere.qcow2", 2, "'/nowhere.qcow2': no such file"),
        (f"vm run --disk {tmp_path}/disk.vdi", 2, "expected FORMAT:PATH"),
        ("vm run --memory much", 2, "expected a number of MiB"),
        ("vm run --memory 0", 2, "expected a number of MiB"),
        ("vm run --cpus 0", 2, "--cpus"),
        ("vm run --device vhost", 2, "--device"),
        ("vm run", 2, "nothing to boot (expected --kernel, --disk, --vmx"),
        ("vm run --append quiet", 2, "--initrd and --append need --kernel"),
        ("vm args", 2, "--socket"),
        (f"vm args --socket /s --vmx {tmp_path}/b.vmx", 2, "expected a .vmx file"),
        (f"vm args --socket /s --vmx {vmx}", 2, "expected 7 or later"),
        (f"vm run --vmx {tmp_path}/b.vmx --qemu /nowhere", 2, "b.vmx: No such file or directory"),
        (f"vm demo --copy {tmp_path}/nothing", 2, "no such folder"),
    )


@pytest.mark.parametrize("command", ["run --kernel /dev/null", "demo"])
def test_without_the_package_for_qemus_monitor(vsock: Vsock, tmp_path: Path, command: str) -> None:
    """The package is checked before QEMU is searched for or downloaded."""
    package = tmp_path / "qemu"
    package.mkdir()
    (package / "__init__.py").touch()
    vsock.find_modules_in(tmp_path)
    said = vsock.fails("vm", *command.split())
    assert said.startswith("the Python package qemu.qmp, which controls QEMU, is missing")
    assert said.endswith("pip install qemu.qmp")


class TestArguments:
    def test_both_commands(self, vsock: Vsock, tmp_path: Path) -> None:
        disk = tmp_path / "disk.img"
        disk.touch()
        where = ("--socket", "/run/vm5", "--accel", "tcg")
        done = vsock("vm", "args", *where, "--cid", 5, "--memory", "2G", "--disk", disk)
        device, qemu = map(shlex.split, done.stdout.splitlines())
        assert device == ["vsock", "device", "vmci", "--socket", "/run/vm5", "--cid", "5", "&"]
        assert qemu[0] == "qemu-system-x86_64"
        assert qemu[qemu.index("-m") + 1] == "2048M"
        assert any('"driver": "raw"' in word and str(disk) in word for word in qemu)

    def test_arguments_for_a_vmware_machine(self, vsock: Vsock, tmp_path: Path) -> None:
        vmx = tmp_path / "a.vmx"
        vmx.write_text(
            'virtualHW.version = "8"\nmemSize = "64"\nnumvcpus = "3"\nvmci0.id = "77"\n'
            'displayName = "web"\nethernet0.present = "TRUE"\nethernet0.virtualDev = "e1000"\n'
        )
        where = ("--socket", "/run/vm5", "--accel", "tcg", "--vmx", vmx)
        done = vsock("vm", "args", *where, "--cpus", "1")
        device, qemu = map(shlex.split, done.stdout.splitlines())
        assert device[-3:] == ["--cid", "77", "&"]
        assert [qemu[qemu.index(option) + 1] for option in ("-name", "-m", "-smp")] == [
            *("web", "64M", "1,maxcpus=2"),
        ]
        assert "-netdev" not in qemu
        assert "ignored: ethernet: a e1000 (--network user adds a card)" in done.stderr
        done = vsock("vm", "args", *where, "--network", "user")
        assert "e1000,netdev=net0" in done.stdout
        assert done.stderr == ""

    def test_arguments_for_libvirt(self, vsock: Vsock) -> None:
        done = vsock("vm", "args", "--socket", "/run/vm5", "--device", "virtio", "--libvirt")
        assert done.stdout.startswith("<domain")
        assert done.stderr == (
            "vsock: start the device first: vsock device virtio --socket /run/vm5\n"
        )
