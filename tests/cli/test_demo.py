"""``vsock demo``."""

from __future__ import annotations

import contextlib
import errno
import json
import signal
from pathlib import Path

import click
import pytest

from vsockets.cli.demo import command
from vsockets.testing import wait_until

from .vsock import Running, Vsock


def children_of(pid: int) -> dict[int, list[str]]:
    """Return the command lines of a process's children, by pid."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_text().split("\0")
        except OSError:
            continue  # the process has ended
        if parent == pid:
            found[int(folder.name)] = command
    return found


def scratch_of(command: list[str]) -> Path:
    """Return the temporary folder of the vsockd with this command line."""
    return Path(command[command.index("--dir") + 1]).parent


def wait_for_children(running: Running, number: int) -> tuple[set[int], Path]:
    """Wait for ``number`` children; return their pids and the fabric's temporary folder."""
    children: dict[int, list[str]] = {}

    def enough() -> bool:
        children.update(children_of(running.process.pid))
        return len(children) >= number

    wait_until(enough, "the demo's processes")
    (vsockd,) = (command for command in children.values() if "vsockets.daemon" in command)
    return set(children), scratch_of(vsockd)


def test_demo_succeeds(alone: Vsock) -> None:
    told = json.loads(alone.start("demo", "--json").finish()[0])
    assert told["ok"]
    assert [step["step"] for step in told["steps"]] == [
        "files over a stream",
        "datagrams",
        "datagrams",
        "guest to guest",
        "host to guest",
        "the same over TCP",
        "over vSockets",
    ]
    assert all(step["ok"] for step in told["steps"])
    assert "EHOSTUNREACH" in told["steps"][3]["result"]
    throughput = told["throughput"]
    assert throughput["bytes"] >= 64_000_000
    assert throughput["ratio"] > 0
    assert len(throughput["MB_per_s"]["vsock"]) == len(throughput["MB_per_s"]["tcp"]) >= 3


@pytest.mark.parametrize("ok", [True, False])
def test_the_table_fits_a_terminal_and_a_failed_step_is_a_failure(
    ok: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = command.judge_refusal(errno.EHOSTUNREACH if ok else 0, 3, 4)
    measured = {"median_MB_per_s": {"vsock": 1, "tcp": 1}, "ratio": 1.0, "intact": True}
    steps = [refused, *command.judge_throughput(measured)]
    monkeypatch.setattr("vsockets.cli.demo.stage.Stage", contextlib.nullcontext)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setenv("COLUMNS", "80")
    status = 0
    try:
        command.perform(lambda stage, show_progress: (steps, measured), False)
    except click.exceptions.Exit as exit_:
        status = exit_.exit_code
    assert status == (0 if ok else 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["STEP", "WHO", "RESULT"]
    assert all(len(line) <= 80 for line in lines)
    assert any("FAILED" in line for line in lines) is not ok


def test_interrupted_demo_leaves_nothing(alone: Vsock) -> None:
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        running = alone.start("demo")
        children, scratch = wait_for_children(running, 4)
        running.process.send_signal(number)
        assert running.finish(expect=status) == (b"", "")
        assert not any(Path(f"/proc/{pid}").exists() for pid in children)
        assert not scratch.exists()


def test_unexpected_results_are_failures() -> None:
    assert command.judge_refusal(errno.EHOSTUNREACH, 3, 4).ok
    assert not command.judge_refusal(0, 3, 4).ok
    assert not command.judge_refusal(errno.ECONNRESET, 3, 4).ok
    heard = {"us": [3, 99], "service": [2, command.SOURCES], "answer": {"source": [3, 99]}}
    assert command.judge_datagrams(heard, 3).ok
    assert not command.judge_datagrams(heard, 4).ok
    assert not command.judge_datagrams({**heard, "answer": {"source": [4, 99]}}, 3).ok
    assert command.judge_permission(0, {"client": [2, 99]}, 4).ok
    assert not command.judge_permission(0, {"client": [3, 99]}, 4).ok
