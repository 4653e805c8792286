"""Behaviour common to all commands."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vsockets.cli.app import start
from vsockets.extras import how_to_install

from .vsock import PATIENCE, PROGRAM, Vsock


def test_version(alone: Vsock) -> None:
    assert alone("--version").stdout.startswith("vsock ")


def test_without_arguments_the_help_lists_the_commands(alone: Vsock) -> None:
    printed = alone().stdout
    for command in ("up", "down", "status", "context", "run", "connect", "listen", "ls", "demo"):
        assert command in printed


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("bogus", "bogus"),
        ("context", "vsock context --help"),
        ("ls --nothing", "--nothing"),
        ("ls --listening --state bound", "exclude each other"),
        ("run", "PROGRAM"),
        ("connect host no-port", "port 'no-port': expected a number"),
        ("connect nobody 5000", "CID 'nobody': expected a number"),
        ("listen 5000 -u --seqpacket", "exclude each other"),
        ("listen 5000 -u -e cat", "--exec needs a stream"),
        ("listen 5000 -w -1", "--timeout: '-1': expected a number of seconds from 0"),
        ("listen 5000 -e '\"'", "No closing quotation"),
    ],
)
def test_usage_errors_are_one_line_and_exit_with_2(
    command: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(shlex.split(command)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("vsock: ")
    assert printed.err.count("\n") == 1
    assert text in printed.err


def test_missing_libraries_are_one_line() -> None:
    script = "import sys; sys.modules['click'] = None; import vsockets.cli as t; exit(t.main())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 1
    line = f"vsock: the Python package click is missing: {how_to_install()}\n"
    assert done.stderr == line


def test_option_dir_overrides_the_environment(alone: Vsock, tmp_path: Path) -> None:
    alone.environment["VSOCKETS_CONTEXT"] = "/nowhere"
    other = tmp_path / "other"
    assert str(other) in alone.fails("--dir", other, "status")
    added = alone("--dir", other, "context", "add", "7").stdout
    try:
        assert added == "7\n"
        assert "no program listens" in alone.fails("--dir", other, "connect", "host", "5000")
        found = alone("--dir", other, "run", "--cid", "7", "sh", "-c", "echo $VSOCKETS_DIR").stdout
        assert found == f"{other}\n"
    finally:
        alone("--dir", other, "down")


def test_debug_mode_shows_a_traceback(alone: Vsock) -> None:
    alone.environment["VSOCKETS_DEBUG"] = "1"
    assert "Traceback" in alone("status", expect=1).stderr


def test_closed_standard_output_is_status_1(vsock: Vsock) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(
        [*PROGRAM, "status"], env=vsock.environment, stdout=writer, stderr=subprocess.PIPE
    ) as process:
        os.close(writer)
        _, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, error) == (1, b"")


def test_commands_without_tables_do_not_import_rich(vsock: Vsock) -> None:
    vsock.environment["PYTHONPROFILEIMPORTTIME"] = "1"
    loaded = vsock("connect", "host", "5000", expect=1).stderr
    assert "vsockets.cli.relay" in loaded
    for module in ("rich.console", "rich.table", "vsockets.testing", "vsockets.daemon"):
        assert module not in loaded
