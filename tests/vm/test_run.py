"""``vsock vm run``: machines that are contexts, and what becomes of both."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from vsockets.testing import PrivateFabric, wait_until
from vsockets.vm.guest_image import COMMAND_LINE
from vsockets.vm.lifecycle_sync import LifecycleSync

from . import downloads, vmware
from .conftest import COMMON, Stage
from .exchanges import PATIENCE, serve
from .launched import Launched

#: Of the machines of TestLife, and of those that are not booted.
CID, BARE = 70, 75


@pytest.fixture(scope="module", params=["vmci", "virtio"])
def launched(
    request: pytest.FixtureRequest, stage: Stage, fabric_of_machines: PrivateFabric
) -> Iterator[Launched]:
    """A running guest of each device."""
    parts = stage.parts("stable", request.param)
    grace = ("--grace", "1")
    launched = Launched(fabric_of_machines, *parts, *grace, cid=CID, device=request.param)
    with launched:
        launched.run(COMMON)
        yield launched


def state(fabric: PrivateFabric, cid: int = CID) -> str | None:
    """Of a context; None when it has gone."""
    found = [row["state"] for row in fabric.control.contexts() if row["cid"] == cid]
    return found[0] if found else None


@contextlib.contextmanager
def changes(fabric: PrivateFabric, *expected: str) -> Iterator[None]:
    """Within this context the guest's context has these changes and no others."""
    with fabric.control.events("context") as events:
        yield
        found: list[str] = []
        while len(found) < len(expected):
            found.append(events.wait(PATIENCE)["change"])
        # What could still come would come before this.
        fabric.control.add_context(CID + 1)
        fabric.control.remove_context(CID + 1)
        while events.wait(PATIENCE)["cid"] == CID:
            found.append("another one")
        events.wait(PATIENCE)
    assert tuple(found) == expected


def stream(machine: Launched) -> Any:
    """One between the host and the guest, which echoes."""
    server, port = serve(machine)
    with server:
        machine.start("echo(connect(port))", port=port)
        sock, peer = server.accept()
    assert peer[0] == machine.cid
    sock.settimeout(PATIENCE)
    assert works(sock)
    return sock


def works(sock: Any) -> bool:
    sock.sendall(b"hello")
    return bool(sock.recv(5) == b"hello")


def is_over(sock: Any) -> bool:
    try:
        return bool(sock.recv(1) == b"")
    except ConnectionResetError:
        return True


class TestLife:
    def test_its_context_is_leased_and_nothing_has_a_name(
        self, launched: Launched, fabric_of_machines: PrivateFabric
    ) -> None:
        (row,) = [row for row in fabric_of_machines.control.contexts() if row["cid"] == CID]
        assert (row["state"], row["leased"]) == ("running", True)
        assert launched.qemu is not None
        used = {arguments_of(pid)[-1] for pid in descendants(launched.qemu.pid)}
        with stream(launched) as sock:
            assert works(sock)
        assert not [path for path in used if path.startswith("/tmp/vsock-vm-")]

    def test_the_context_follows_the_machine(
        self, launched: Launched, fabric_of_machines: PrivateFabric
    ) -> None:
        with stream(launched) as sock, changes(fabric_of_machines, "suspend", "resume"):
            launched.monitor("stop")
            wait_until(lambda: state(fabric_of_machines) == "suspended", seconds=PATIENCE)
            assert is_over(sock)
            launched.monitor("cont")
        with stream(launched):
            assert state(fabric_of_machines) == "running"

    def test_the_machine_follows_the_context(
        self, launched: Launched, fabric_of_machines: PrivateFabric
    ) -> None:
        control = fabric_of_machines.control
        with stream(launched) as sock, changes(fabric_of_machines, "suspend", "resume"):
            control.suspend(CID)
            assert is_over(sock)
            wait_until(lambda: status_of(launched) == "paused", seconds=PATIENCE)
            control.resume(CID)
            wait_until(lambda: status_of(launched) == "running", seconds=PATIENCE)
        with stream(launched):
            pass

    def test_a_reset_ends_streams(
        self, launched: Launched, fabric_of_machines: PrivateFabric
    ) -> None:
        with stream(launched) as sock:
            with changes(fabric_of_machines, "reset"):
                launched.monitor("system_reset")
                assert is_over(sock)
            launched.wait_for_boot()
            launched.run(COMMON)
        with stream(launched):
            pass

    def test_told_to_end_it_leaves_nothing(
        self, launched: Launched, fabric_of_machines: PrivateFabric
    ) -> None:
        """The guest here does not heed the power button: it is powered off after a second."""
        assert launched.qemu is not None
        parts = descendants(launched.qemu.pid)
        assert len(parts) == 2
        launched.qemu.terminate()
        assert launched.qemu.wait(PATIENCE) == 128 + signal.SIGTERM
        assert "powering off" in launched.log
        assert not any(map(alive, parts))
        wait_until(lambda: state(fabric_of_machines) is None, seconds=PATIENCE)


def test_a_machine_of_vmwares(stage: Stage, fabric_of_machines: PrivateFabric) -> None:
    """It boots from its own disk, and keeps its CID."""
    linux, initrd, folder = stage.parts("stable", "vmci")
    vmx = vmware.make(folder, linux.image, initrd, -559038737, "lsilogic")
    cid = 2**32 - 559038737
    parts = linux, initrd, folder
    launched = Launched(fabric_of_machines, *parts, "--grace", "0", cid=cid, vmx=vmx)
    with launched:
        launched.run(COMMON)
        found = launched.run(
            """
            def read(path):
                with open(path) as file: return file.read()
            pci = '/sys/bus/pci/devices'
            result = (
                read('/proc/cmdline'), os.cpu_count(), int(read('/proc/meminfo').split()[1]),
                {read(f'{pci}/{name}/class')[:6] for name in os.listdir(pci)},
            )
            """
        )
        command_line, processors, memory, classes = found
        assert "BOOT_IMAGE=vmlinuz" in command_line
        assert processors == 2
        assert 240 << 10 < memory < 320 << 10
        assert "0x0200" not in classes  # no network card
        with stream(launched):
            pass
    for what in ("scsi0.virtualDev: lsilogic", "sata0:1: cdrom-raw", "usb", "sound", "ethernet"):
        assert f"not carried over: {what}" in launched.log


def status_of(machine: Launched) -> str:
    return str(machine.monitor("query-status")["status"])


# Its processes, with a machine that has nothing to boot


def arguments_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def descendants(pid: int) -> list[int]:
    """A process's children, which have none."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def bare(stage: Stage, fabric_of_machines: PrivateFabric) -> Iterator[subprocess.Popen[str]]:
    """The command, once its machine runs."""
    stage.parts("stable", "virtio")  # or the test is skipped
    command = [sys.executable, "-m", "vsockets.cli", "--dir", str(fabric_of_machines.folder)]
    command += ["vm", "run", "--accel", "tcg", "--qemu", downloads.qemu(), "--cid", str(BARE)]
    command += ["--memory", "32M", "--device", "virtio"]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert any("SeaBIOS" in line for line in process.stdout)
            yield process
        finally:
            process.kill()


def test_a_killed_part_ends_the_rest(
    bare: subprocess.Popen[str], fabric_of_machines: PrivateFabric
) -> None:
    parts = descendants(bare.pid)
    (device,) = [pid for pid in parts if "--until-eof" in arguments_of(pid)]
    os.kill(device, signal.SIGKILL)
    _, said = bare.communicate(timeout=PATIENCE)
    assert bare.returncode == 1
    assert said.endswith("vsock: the device has ended (killed by signal 9), and QEMU with it\n")
    assert not any(map(alive, parts))


def test_a_device_that_lost_its_guests_memory(bare: subprocess.Popen[str]) -> None:
    """What it says of that is passed on, and is not cut off by its end."""
    (device,) = [pid for pid in descendants(bare.pid) if "--until-eof" in arguments_of(pid)]
    os.kill(device, signal.SIGBUS)
    _, said = bare.communicate(timeout=PATIENCE)
    assert "vsock: the device: vsock device: the guest's memory cannot be accessed" in said
    assert said.endswith("vsock: the device has ended (status 135), and QEMU with it\n")


def test_a_guest_that_panics(stage: Stage, fabric_of_machines: PrivateFabric) -> None:
    """It has no file system; the machine ends with its first reset."""
    linux, _, _ = stage.parts("stable", "virtio")  # or the test is skipped
    command = [sys.executable, "-m", "vsockets.cli", "--dir", str(fabric_of_machines.folder)]
    command += ["vm", "run", "--accel", "tcg", "--qemu", downloads.qemu(), "--device", "virtio"]
    command += ["--kernel", str(linux.image), "--append", COMMAND_LINE, "--", "-no-reboot"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE * 2
    )
    assert done.returncode == 1
    assert "Kernel panic - not syncing: VFS: Unable to mount root fs" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("vsock: the guest reset its machine")


def test_killed_itself_it_leaves_nothing(
    bare: subprocess.Popen[str], fabric_of_machines: PrivateFabric
) -> None:
    parts = descendants(bare.pid)
    bare.kill()
    bare.wait(PATIENCE)
    wait_until(lambda: not any(map(alive, parts)), seconds=PATIENCE)
    wait_until(lambda: state(fabric_of_machines, BARE) is None, seconds=PATIENCE)


def test_powered_off_by_its_administrator(
    bare: subprocess.Popen[str], fabric_of_machines: PrivateFabric
) -> None:
    wait_until(lambda: state(fabric_of_machines, BARE) == "running", seconds=PATIENCE)
    fabric_of_machines.control.power_off(BARE)
    assert bare.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("savevm one",), ("suspend", "resume")),
        (("savevm one", "loadvm one"), ("suspend", "resume") * 2),
        (("migrate exec:cat>/dev/null",), ("migrate",)),
    ],
)
def test_snapshots_and_migration(
    stage: Stage,
    fabric_of_machines: PrivateFabric,
    command: tuple[str, ...],
    expected: tuple[str, ...],
) -> None:
    """A QEMU's, without our device: with one in the machine it refuses them."""
    _, _, folder = stage.parts("stable", "virtio")  # or the test is skipped
    control = fabric_of_machines.control
    if shutil.which("qemu-img") is None:
        pytest.skip("no qemu-img: apt install qemu-utils")
    disk = folder / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "1M"], check=True)
    control.add_context(BARE)
    told: list[str] = []

    async def follow() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            qemu = await asyncio.create_subprocess_exec(
                *(downloads.qemu(), "-S", "-nodefaults", "-display", "none", "-m", "32M"),
                *("-accel", "tcg", "-blockdev", f"file,filename={disk},node-name=file"),
                *("-blockdev", "qcow2,file=file,node-name=disk"),
                *("-device", "virtio-blk-pci,drive=disk"),
                *("-chardev", f"socket,id=monitor,fd={theirs.fileno()}"),
                *("-qmp", "chardev:monitor"),
                pass_fds=[theirs.fileno()],
            )
        qmp = QMPClient()
        try:
            async with asyncio.timeout(PATIENCE):
                await qmp.connect(ours)
                with qmp.listener(("RESUME",)) as resumes:
                    following = LifecycleSync(qmp, control, BARE, told.append)
                    follows = asyncio.create_task(following.run())
                    await resumes.get()
                    for line in command:
                        request = {"command-line": line}
                        assert await qmp.execute("human-monitor-command", request) == ""
                    for change in expected:
                        event = await anext(events)
                        assert (event["cid"], event["change"]) == (BARE, change)
                    follows.cancel()
        finally:
            qemu.kill()
            await qemu.wait()
            with contextlib.suppress(EOFError):
                await qmp.disconnect()

    try:
        with control.events("context") as events:
            asyncio.run(follow())
        assert told == []
    finally:
        control.remove_context(BARE)
