"""Services and their clients, as the examples' pages have readers run them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vm import downloads

from .conftest import EXAMPLES, RunPage, fetched


def test_adapters(run_page: RunPage) -> None:
    for library in ("httpx", "uvicorn"):
        pytest.importorskip(library, reason=f"needs {library}")
    run_page("adapters")


def test_firecracker(run_page: RunPage) -> None:
    run_page("firecracker")


def test_nitro(run_page: RunPage) -> None:
    run_page("nitro")


def test_grpc_in_python(run_page: RunPage) -> None:
    pytest.importorskip("grpc", reason="needs grpcio")
    run_page("grpc", "client.py")


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze: apt install systemd")
    for unit in ("agent.socket", "agent.service"):
        shutil.copy(EXAMPLES / "systemd" / unit, tmp_path)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / "agent.socket"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "agent." not in done.stderr, done.stderr


def test_systemd_passes_the_socket(run_page: RunPage) -> None:
    if shutil.which("systemd-socket-activate") is None:
        pytest.skip("no systemd-socket-activate: apt install systemd")
    run_page("systemd", "systemd-socket-activate")


def test_systemd_is_notified_by_the_agent(run_page: RunPage) -> None:
    run_page("systemd", "agent.py\n    echo")


def test_systemd_is_notified_by_its_tool(run_page: RunPage, tmp_path: Path) -> None:
    if not has_vsock(shutil.which("systemd-notify")):
        tool = fetched(downloads.systemd_notify)
        programs = tmp_path / "bin"
        programs.mkdir()
        (programs / "systemd-notify").symlink_to(tool)
    run_page("systemd", "systemd-notify")


def test_a_guest_that_fails_before_it_is_ready() -> None:
    """Without a READY=1 the launcher reports the command's status, at once."""
    launcher = [sys.executable, str(EXAMPLES / "systemd/await_ready.py"), "9000"]
    done = subprocess.run(
        [sys.executable, "-m", "vsockets.cli", "fabric", "--", *launcher, "sh", "-c", "exit 7"],
        capture_output=True,
        text=True,
        timeout=50,  # below the launcher's own limit
        check=False,
    )
    assert done.returncode == 1
    assert "the command ended with status 7, and was not ready" in done.stderr


def has_vsock(tool: str | None) -> bool:
    """Return whether this systemd-notify knows vSockets."""
    if tool is None:
        return False
    done = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False)
    found = re.match(r"systemd (\d+)", done.stdout)
    return found is not None and int(found[1]) >= 254
