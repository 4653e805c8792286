"""``vsock up``, ``down`` and ``status``."""

from __future__ import annotations

import os
import shlex
import signal
from pathlib import Path

from vsockets.control import Control
from vsockets.testing import wait_until

from .vsock import Vsock


def test_up_status_and_down(alone: Vsock) -> None:
    none = f"vsockd is not running in {alone.folder} (start it: vsock up)"
    alone.fail(("status", 1, none), ("down", 1, none), ("ls", 1, none))
    assert alone("up").stdout.startswith(f"vsockd serves {alone.folder} (pid ")
    facts = alone.json("status")
    assert facts["folder"] == str(alone.folder)
    again = f"vsockd is already running in {alone.folder} (pid {facts['pid']})\n"
    assert alone("up").stdout == again
    assert alone("down").stdout == f"vsockd in {alone.folder} has ended\n"
    assert os.listdir(alone.folder) == []
    assert "vsockd is not running" in alone.fails("status")


def test_commands_in_hints_run_as_printed(alone: Vsock, tmp_path: Path) -> None:
    """With ``--dir``, and for a context elsewhere, a hint names the state folder."""
    given = tmp_path / "two words"
    del alone.environment["VSOCKETS_DIR"]
    line = alone.fails("--dir", given, "status")
    start = f"vsock --dir '{given}' up"
    assert line == f"vsockd is not running in {given} (start it: {start})"
    assert alone(*shlex.split(start)[1:]).stdout.startswith(f"vsockd serves {given} ")
    line = alone.fails("--dir", given, "connect", "99", "5000")
    for see in (f"vsock --dir '{given}' context ls", f"vsock --dir '{given}' events denial"):
        assert f"{see})" in line or f"{see}," in line
    line = alone.fails("--dir", given, "context", "suspend", "99")
    assert line.endswith(f"no context 99 (see: vsock --dir '{given}' context ls)")
    assert f" {given} " in alone("--dir", given, "down").stdout
    alone.environment["VSOCKETS_CONTEXT"] = f"{given}/3"
    assert alone.fails("connect", "2", "5000").endswith(f"(start it: {start})")


def test_a_folder_that_cannot_be_used_is_named_once(alone: Vsock, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    expected = f"cannot start vsockd: {file}: not used, because it is not a folder of user "
    assert alone.fails("--dir", file, "context", "ls").count(str(file)) == 1
    alone.environment["VSOCKETS_DIR"] = str(file)
    line = alone.fails("up")
    assert line.startswith(expected)
    assert line.endswith("(choose another by --dir or VSOCKETS_DIR)")


def test_foreground(alone: Vsock) -> None:
    running = alone.start("up", "--foreground", "--log-level", "info")

    def pid() -> int:
        try:
            with Control(alone.folder) as control:
                status = control.status()
                return int(status["holder"] or status["pid"])
        except OSError:
            return 0

    assert wait_until(pid, "vsockd to serve") == running.process.pid
    running.process.send_signal(signal.SIGTERM)
    running.finish()


def test_a_replacement_keeps_the_number_of_restarts(alone: Vsock) -> None:
    alone("up", "--replace", "--restarts", 0)  # it starts vsockd
    pid = alone.json("status")["pid"]
    alone.fail(("up --replace --restarts 5", 2, "a replacement keeps its number"))
    assert alone.json("status")["pid"] == pid
    alone("up", "--replace")
    status = alone.json("status")
    assert status["pid"] != pid and status["holder"] is None


def test_a_killed_vsockd_is_started_again(alone: Vsock) -> None:
    """In the background, too, where its standard descriptors have been replaced."""
    alone("up", "--restarts", 5)
    with Control(alone.folder) as control:
        guest, status = control.add_context()["cid"], control.status()
        assert status["holder"] is not None
        os.kill(status["pid"], signal.SIGKILL)
        wait_until(lambda: control.status()["pid"] != status["pid"], "vsockd to be started again")
        assert control.status()["holder"] == status["holder"]
        assert guest in {row["cid"] for row in control.contexts()}


def test_no_restarts(alone: Vsock) -> None:
    alone("up", "--restarts", 0)
    with Control(alone.folder) as control:
        assert control.status()["holder"] is None


def test_several_at_once_start_one_vsockd(alone: Vsock) -> None:
    added = [alone.start("context", "add") for _ in range(4)]
    cids = {running.finish() for running in added}
    assert cids == {(b"3\n", ""), (b"4\n", ""), (b"5\n", ""), (b"6\n", "")}
    assert ["contexts", "5"] in [line.split() for line in alone("status").stdout.splitlines()]
