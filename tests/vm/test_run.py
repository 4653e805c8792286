"""``vsock vm run``: the life cycle of machines and their contexts."""

from __future__ import annotations

import asyncio
import contextlib
import errno
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

import vsockets
from vsockets.testing import PrivateFabric, wait_until
from vsockets.vm.guest_image import COMMAND_LINE
from vsockets.vm.lifecycle_sync import LifecycleSync

from . import downloads, vmware_machine
from .conftest import COMMON, Stage
from .exchanges import PATIENCE, dial, has_virtio_device, serve
from .launched import Launched
from .machine import GuestError

#: CIDs of the machines of TestLife, and of those that boot nothing.
CID, EMPTY = 70, 75


@pytest.fixture(scope="module", params=["vmci", "virtio"])
def launched(
    request: pytest.FixtureRequest, stage: Stage, fabric_of_machines: PrivateFabric
) -> Iterator[Launched]:
    """A running guest for each device."""
    parts = stage.parts("stable", request.param)
    options = ("--grace", "1", "--wait-ready")
    launched = Launched(fabric_of_machines, *parts, *options, cid=CID, device=request.param)
    with launched:
        launched.run(COMMON)
        yield launched


def state(fabric: PrivateFabric, cid: int = CID) -> str | None:
    """Return the state of a context, or None if it was removed."""
    found = [row["state"] for row in fabric.control.contexts() if row["cid"] == cid]
    return found[0] if found else None


@contextlib.contextmanager
def changes(fabric: PrivateFabric, *expected: str) -> Iterator[None]:
    """Check that the guest's context has exactly these changes while the context manager lasts."""
    with fabric.control.events("context") as events:
        yield
        found: list[str] = []
        while len(found) < len(expected):
            found.append(events.wait(PATIENCE)["change"])
        # Events are ordered: all further changes of the guest would precede this one.
        fabric.control.add_context(CID + 1)
        fabric.control.remove_context(CID + 1)
        while events.wait(PATIENCE)["cid"] == CID:
            found.append("unexpected")
        events.wait(PATIENCE)
    assert tuple(found) == expected


def stream(machine: Launched) -> Any:
    """Return a stream between the host and the guest, which echoes."""
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


def has_ended(sock: Any) -> bool:
    try:
        return bool(sock.recv(1) == b"")
    except ConnectionResetError:
        return True


#: What systemd does with its credential: finds it in the strings of SMBIOS, and sends a datagram or
#: else a sequenced packet.
NOTIFY = """
import re
with open("/sys/firmware/dmi/tables/DMI", "rb") as file: table = file.read()
found = re.search(rb"io.systemd.credential:vmm.notify_socket=vsock:(\\d+):(\\d+)", table)
address = int(found[1]), int(found[2])
def notify(text):
    try:
        s = dgram()
        s.sendto(text, address)
    except OSError as error:
        s = socket.socket(AF, socket.SOCK_SEQPACKET)
        s.connect(address)
        s.send(text)
    s.close()
notify(b"STATUS=Starting \\x1b[31mall\\nX_SYSTEMD_UNIT_ACTIVE=basic.target")
notify(b"UNKNOWN=1\\nREADY=1\\n")
notify(b"READY=1")
result = address[1]
"""


class TestLife:
    def test_guest_reports_that_it_is_ready(
        self, launched: Launched, fabric_of_machines: PrivateFabric
    ) -> None:
        with changes(fabric_of_machines, "ready"):
            port = int(launched.run(NOTIFY))
        assert "vsock: guest: Starting \\x1b[31mall\n" in launched.log
        assert "vsock: guest: active: basic.target\n" in launched.log
        assert launched.log.count("vsock: the guest is ready (") == 1
        # Another context cannot report for this guest.
        with vsockets.socket(type=socket.SOCK_DGRAM, context=launched.host) as sock:
            sock.bind((2, vsockets.VMADDR_PORT_ANY))
            sock.sendto(b"STATUS=of another", (2, port))
        launched.run(NOTIFY)
        assert "of another" not in launched.log

    def test_context_is_leased_and_sockets_are_unnamed(
        self, launched: Launched, fabric_of_machines: PrivateFabric
    ) -> None:
        (row,) = [row for row in fabric_of_machines.control.contexts() if row["cid"] == CID]
        assert (row["state"], row["leased"]) == ("running", True)
        assert launched.qemu is not None
        used = {arguments_of(pid)[-1] for pid in descendants(launched.qemu.pid)}
        with stream(launched) as sock:
            assert works(sock)
        assert not [path for path in used if path.startswith("/tmp/vsock-vm-")]

    def test_monitor_commands_change_the_context(
        self, launched: Launched, fabric_of_machines: PrivateFabric
    ) -> None:
        with stream(launched) as sock, changes(fabric_of_machines, "suspend", "resume"):
            launched.monitor("stop")
            wait_until(lambda: state(fabric_of_machines) == "suspended", seconds=PATIENCE)
            assert has_ended(sock)
            launched.monitor("cont")
        with stream(launched):
            assert state(fabric_of_machines) == "running"

    def test_context_commands_change_the_machine(
        self, launched: Launched, fabric_of_machines: PrivateFabric
    ) -> None:
        control = fabric_of_machines.control
        with stream(launched) as sock, changes(fabric_of_machines, "suspend", "resume"):
            control.suspend(CID)
            assert has_ended(sock)
            wait_until(lambda: status_of(launched) == "paused", seconds=PATIENCE)
            control.resume(CID)
            wait_until(lambda: status_of(launched) == "running", seconds=PATIENCE)
        with stream(launched):
            pass

    def test_reset_ends_streams(
        self, launched: Launched, fabric_of_machines: PrivateFabric
    ) -> None:
        with stream(launched) as sock:
            with changes(fabric_of_machines, "reset"):
                launched.monitor("system_reset")
                assert has_ended(sock)
            launched.wait_for_boot()
            launched.run(COMMON)
        with stream(launched):
            pass

    def test_crashed_device_is_replaced(self, launched: Launched) -> None:
        """Streams end in the guest with ECONNRESET, its listener lives, and new streams work."""
        if launched.kind != "virtio":
            return  # QEMU cannot replace a vfio-user device: test_killed_device_ends_qemu
        launched.run("import sys; sys.listening = listener(4000)")
        flood = "import sys; s = sys.listening.accept()[0]\nwhile True: s.sendall(bytes(65536))"
        flooding = launched.start(flood)
        flooded = dial(launched, 4000)
        server, port = serve(launched)
        with flooded, server:
            reading = launched.start("s = connect(port); s.sendall(b'x'); s.recv(1)", port=port)
            sock, _ = server.accept()
            with sock:
                sock.settimeout(PATIENCE)
                assert sock.recv(1) == b"x"
                assert flooded.recv(1 << 20)
                assert launched.qemu is not None
                os.kill(device_of(launched.qemu), signal.SIGKILL)
                assert has_ended(sock)
                while flooded.recv(1 << 20):
                    pass
        # A send that begins after the reset finds a socket that is not connected.
        for job, ends in (
            (reading, {errno.ECONNRESET}),
            (flooding, {errno.ECONNRESET, errno.ENOTCONN}),
        ):
            with pytest.raises(GuestError) as failed:
                job.result()
            assert failed.value.errno in ends
        wait_until(lambda: "the guest has another device" in launched.log, seconds=PATIENCE)
        wait_until(lambda: has_virtio_device(launched), seconds=PATIENCE)
        accepting = launched.start("import sys; result = echo(sys.listening.accept()[0])")
        with dial(launched, 4000) as sock:
            assert works(sock)
            sock.shutdown(socket.SHUT_WR)
            assert accepting.result() == 5
        with stream(launched):
            pass

    def test_sigterm_leaves_no_process_or_context(
        self, launched: Launched, fabric_of_machines: PrivateFabric
    ) -> None:
        """The guest ignores the power button: it is powered off after a second."""
        assert launched.qemu is not None
        parts = descendants(launched.qemu.pid)
        assert len(parts) == 2
        launched.qemu.terminate()
        assert launched.qemu.wait(PATIENCE) == 128 + signal.SIGTERM
        assert "powering off" in launched.log
        assert not any(map(alive, parts))
        wait_until(lambda: state(fabric_of_machines) is None, seconds=PATIENCE)


def test_machine_created_by_vmware(stage: Stage, fabric_of_machines: PrivateFabric) -> None:
    """The machine boots from its own disk and keeps its CID."""
    linux, initrd, folder = stage.parts("stable", "vmci")
    vmx = vmware_machine.create_machine(folder, linux.image, initrd, -559038737, "lsilogic")
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
        assert f"ignored: {what}" in launched.log


def status_of(machine: Launched) -> str:
    return str(machine.monitor("query-status")["status"])


# Processes of a machine that boots nothing


def arguments_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def descendants(pid: int) -> list[int]:
    """Return a process's children, which have no children themselves."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def device_of(process: subprocess.Popen[Any]) -> int:
    """Return the device's process of a command."""
    (device,) = [pid for pid in descendants(process.pid) if "--until-eof" in arguments_of(pid)]
    return device


@pytest.fixture(params=["virtio"])
def empty(
    request: pytest.FixtureRequest, stage: Stage, fabric_of_machines: PrivateFabric
) -> Iterator[subprocess.Popen[str]]:
    """The process of the command, once its machine, with a device of either kind, runs."""
    stage.parts("stable", request.param)  # skips without QEMU
    command = [sys.executable, "-m", "vsockets.cli", "--dir", str(fabric_of_machines.folder)]
    command += ["vm", "run", "--accel", "tcg", "--qemu", downloads.qemu(), "--cid", str(EMPTY)]
    command += ["--memory", "32M", "--device", request.param, "--", "-boot", "menu=off"]
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


@pytest.mark.parametrize("empty", ["vmci"], indirect=True)
def test_killed_device_ends_qemu(
    empty: subprocess.Popen[str], fabric_of_machines: PrivateFabric
) -> None:
    parts = descendants(empty.pid)
    os.kill(device_of(empty), signal.SIGKILL)
    _, output = empty.communicate(timeout=PATIENCE)
    assert empty.returncode == 1
    assert output.endswith("vsock: the device has ended (killed by signal 9), and QEMU with it\n")
    assert not any(map(alive, parts))


def test_device_without_guest_memory_is_reported(empty: subprocess.Popen[str]) -> None:
    """The device's last message is passed on in full."""
    os.kill(device_of(empty), signal.SIGBUS)
    _, output = empty.communicate(timeout=PATIENCE)
    assert "vsock: the device: vsock device: the guest's memory cannot be accessed" in output
    assert output.endswith("vsock: the device has ended (status 135), and QEMU with it\n")


def test_guest_panic_ends_the_machine(stage: Stage, fabric_of_machines: PrivateFabric) -> None:
    """A guest without a file system panics; the machine ends with its first reset."""
    linux, _, _ = stage.parts("stable", "virtio")  # skips without QEMU
    command = [sys.executable, "-m", "vsockets.cli", "--dir", str(fabric_of_machines.folder)]
    command += ["vm", "run", "--accel", "tcg", "--qemu", downloads.qemu(), "--device", "virtio"]
    command += ["--kernel", str(linux.image), "--append", COMMAND_LINE, "--", "-no-reboot"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE * 2
    )
    assert done.returncode == 1
    assert "Kernel panic - not syncing: VFS: Unable to mount root fs" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("vsock: the guest reset its machine")


def test_sigkill_leaves_no_process_or_context(
    empty: subprocess.Popen[str], fabric_of_machines: PrivateFabric
) -> None:
    parts = descendants(empty.pid)
    empty.kill()
    empty.wait(PATIENCE)
    wait_until(lambda: not any(map(alive, parts)), seconds=PATIENCE)
    wait_until(lambda: state(fabric_of_machines, EMPTY) is None, seconds=PATIENCE)


def test_power_off_of_the_context_ends_the_machine(
    empty: subprocess.Popen[str], fabric_of_machines: PrivateFabric
) -> None:
    wait_until(lambda: state(fabric_of_machines, EMPTY) == "running", seconds=PATIENCE)
    fabric_of_machines.control.power_off(EMPTY)
    assert empty.wait(PATIENCE) == 0


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
    """QEMU without our device, with which it refuses both."""
    _, _, folder = stage.parts("stable", "virtio")  # skips without QEMU
    control = fabric_of_machines.control
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img not found: apt install qemu-utils")
    disk = folder / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "1M"], check=True)
    control.add_context(EMPTY)
    lines: list[str] = []

    async def follow() -> None:
        monitor_end, qemu_end = socket.socketpair()
        with qemu_end:
            qemu = await asyncio.create_subprocess_exec(
                *(downloads.qemu(), "-S", "-nodefaults", "-display", "none", "-m", "32M"),
                *("-accel", "tcg", "-blockdev", f"file,filename={disk},node-name=file"),
                *("-blockdev", "qcow2,file=file,node-name=disk"),
                *("-device", "virtio-blk-pci,drive=disk"),
                *("-chardev", f"socket,id=monitor,fd={qemu_end.fileno()}"),
                *("-qmp", "chardev:monitor"),
                pass_fds=[qemu_end.fileno()],
            )
        qmp = QMPClient()
        try:
            async with asyncio.timeout(PATIENCE):
                await qmp.connect(monitor_end)
                with qmp.listener(("RESUME",)) as resumes:
                    sync = LifecycleSync(qmp, control, EMPTY, lines.append)
                    syncing = asyncio.create_task(sync.run())
                    await resumes.get()
                    for line in command:
                        request = {"command-line": line}
                        assert await qmp.execute("human-monitor-command", request) == ""
                    for change in expected:
                        event = await anext(events)
                        assert (event["cid"], event["change"]) == (EMPTY, change)
                    syncing.cancel()
        finally:
            qemu.kill()
            await qemu.wait()
            with contextlib.suppress(EOFError):
                await qmp.disconnect()

    try:
        with control.events("context") as events:
            asyncio.run(follow())
        assert lines == []
    finally:
        control.remove_context(EMPTY)
