"""``vsock device``: its socket, and how it ends."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path

import pytest

from support.virtio_guest import simulated_guest
from vsockets.devices.guest_memory import STATUS
from vsockets.testing import wait_until

from .vsock import PATIENCE, Running, Vsock

CID = 40


def start(vsock: Vsock, kind: str, path: Path) -> Running:
    """Start a device that listens at ``path``."""
    device = vsock.start("device", kind, "--cid", CID, "--socket", path)
    assert device.read_line() == str(CID)
    return device


@pytest.mark.parametrize("kind", ["vmci", "virtio"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_socket_is_removed_at_the_end(
    vsock: Vsock, tmp_path: Path, kind: str, number: int
) -> None:
    path = tmp_path / "device"
    device = start(vsock, kind, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    device.process.send_signal(number)
    device.finish()
    assert not path.exists()


def test_the_socket_is_removed_after_a_kill(vsock: Vsock, tmp_path: Path) -> None:
    path = tmp_path / "device"
    device = start(vsock, "virtio", path)
    device.process.kill()
    wait_until(lambda: not path.exists(), "the socket to be removed", PATIENCE)


def test_another_devices_socket_is_not_removed(vsock: Vsock, tmp_path: Path) -> None:
    path = tmp_path / "device"
    device = start(vsock, "virtio", path)
    path.rename(tmp_path / "renamed")
    path.touch()
    device.process.terminate()
    device.finish()
    assert path.exists()


def test_a_signal_to_all_its_processes(vsock: Vsock, tmp_path: Path) -> None:
    """Send the signal to every process, as a service manager does."""
    path = tmp_path / "device"
    device = start(vsock, "virtio", path)
    pid = device.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert children
    for process in (*map(int, children), pid):
        os.kill(process, signal.SIGTERM)
    device.finish()
    assert not path.exists()


def test_errors_name_the_invalid_path(vsock: Vsock, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    running = tmp_path / "running"
    start(vsock, "virtio", running)
    expected = {
        "/nosuch/x": "/nosuch: No such file or directory",
        os.fspath(file): f"{file}: the path is in use",
        os.fspath(running): f"{running}: the path is in use",
    }
    for path, line in expected.items():
        for kind in ("vmci", "virtio"):
            assert vsock.fails("device", kind, "--socket", path).startswith(line)
    assert file.read_text() == "precious"
    assert vsock.fails("device", "hybrid", "--socket", "/nosuch/x").startswith("/nosuch: ")


def test_memory_that_is_truncated_ends_it_with_a_line(vsock: Vsock, tmp_path: Path) -> None:
    path = tmp_path / "device"
    device = start(vsock, "virtio", path)
    with simulated_guest(path, CID) as guest:
        os.ftruncate(guest.memory.fd, 0)
        os.eventfd_write(guest.transmit.kick, 1)
        _, said = device.finish(expect=STATUS)
    assert "the virtual machine's monitor has truncated its file" in said
    assert "Traceback" not in said
