"""``vsock nfs`` and ``vsock demo nfs``: command lines and output; tests/nfs has the rest."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from .vsock import PATIENCE, Vsock

needs_fuse = pytest.mark.skipif(
    os.geteuid() != 0
    or not os.access("/dev/fuse", os.R_OK | os.W_OK)
    or importlib.util.find_spec("pyfuse3") is None
    or shutil.which("fusermount3") is None,
    reason="mounting takes root, /dev/fuse, pyfuse3 and fusermount3",
)


def test_bad_command_lines(vsock: Vsock) -> None:
    vsock.fail(
        ("nfs serve", 2, "--export"),
        ("nfs serve --export relative", 2, "expected an absolute path"),
        ("nfs serve --export /none/such", 2, "directory not found"),
        ("nfs serve --export /,fast", 2, "expected ro, rw, cid=CID"),
        ("nfs serve --export / --listen vsock::1", 2, "expected vsock-dgram: or udp:"),
    )


def test_the_server_says_where_it_listens_and_ends_when_told(vsock: Vsock, tmp_path: Path) -> None:
    listen = ("--listen", "vsock-dgram::2050", "--state", str(tmp_path / "state"))
    running = vsock.start("nfs", "serve", "--export", str(tmp_path), *listen)
    assert running.error_line() == "listening on vsock-dgram:2:2050"
    running.process.send_signal(signal.SIGTERM)
    running.finish()


@needs_fuse
def test_a_mount_says_that_no_server_answers(vsock: Vsock, tmp_path: Path) -> None:
    running = vsock.start("nfs", "mount", "vsock-dgram:2:9", "/none", tmp_path)
    assert running.error_line() == (
        "vsock-dgram:2:9 does not answer yet (Connection refused: is there a server?);"
        " trying for 120 s"
    )


@needs_fuse
@pytest.mark.timeout(240)
def test_the_demo(alone: Vsock) -> None:
    running = alone.start("demo", "nfs", "--json")
    printed, _ = running.process.communicate(timeout=PATIENCE * 8)
    told = json.loads(printed)
    assert running.process.returncode == 0, told
    assert [step["ok"] for step in told["steps"]] == [True, True, True]
