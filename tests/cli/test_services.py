"""Forwarders and devices as services: their logs, and their notification of systemd."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .forwarding import ask, tcp
from .vsock import PATIENCE, Running, Vsock


@pytest.fixture
def manager(vsock: Vsock, tmp_path: Path) -> Iterator[socket.socket]:
    """The notification socket of a service manager."""
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.settimeout(PATIENCE)
        vsock.environment["NOTIFY_SOCKET"] = str(path)
        yield sock


def logged(running: Running) -> dict[str, Any]:
    line: dict[str, Any] = json.loads(running.error_line())
    assert line.pop("time") > 1e9
    return line


def test_a_forwarder(vsock: Vsock, manager: socket.socket, tcp_echo: int) -> None:
    arguments = ("tcp:127.0.0.1:0", f"tcp:127.0.0.1:{tcp_echo}")
    running = vsock.start("forward", *arguments, "--log-format", "json", "-v")
    line = logged(running)
    assert line["level"] == "notice"
    assert line["message"].startswith("listening on tcp:127.0.0.1:")
    assert manager.recv(100) == b"READY=1"
    assert ask(tcp(int(line["message"].rpartition(":")[2]))) == b"question"
    assert logged(running)["level"] == "info"  # the connection


def test_a_device(vsock: Vsock, manager: socket.socket, tmp_path: Path) -> None:
    path = tmp_path / "device"
    arguments = ("--cid", 7, "--socket", path)
    running = vsock.start("device", "virtio", *arguments, "--log-format", "json")
    message = f"context 7: the virtio-vsock device listens at {path}"
    assert logged(running) == {"level": "notice", "message": message}
    assert manager.recv(100) == b"READY=1"


def test_log_lines_have_priorities_for_the_journal(vsock: Vsock, tmp_path: Path) -> None:
    with open(tmp_path / "log", "w+b") as log:
        found = os.fstat(log.fileno())
        vsock.environment["JOURNAL_STREAM"] = f"{found.st_dev}:{found.st_ino}"
        device = ("device", "virtio", "--cid", 8, "--socket", tmp_path / "device")
        running = vsock.start(*device, stderr=log.fileno())
        assert running.read_line() == "8"
        log.seek(0)
        assert log.read().startswith(b"<5>vsock device: context 8: ")
