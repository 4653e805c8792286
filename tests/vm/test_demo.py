"""``vsock vm demo``, on a terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from .conftest import Stage

pytestmark = pytest.mark.timeout(240)


def read_until(terminal: int, text: bytes) -> bytes:
    """What comes, up to ``text``."""
    said = b""
    while text not in said:
        try:
            data = os.read(terminal, 65_536)
        except OSError:  # EIO: its last user has ended
            data = b""
        assert data, said.decode(errors="replace")
        said += data
    return said


def test_doors_into_a_guest_without_a_network(stage: Stage, tmp_path: Path) -> None:
    """Everything the demo does; then its shell, and the page from inside in between."""
    stage.parts("stable", "virtio")  # or the test is skipped
    source = tmp_path / "what to copy"
    (source / "a folder").mkdir(parents=True)
    (source / "a folder" / "a file").write_bytes(os.urandom(300_000))
    (source / "empty").touch()
    master, slave = pty.openpty()
    before = termios.tcgetattr(master)
    command = [sys.executable, "-m", "vsockets.tools", "vm", "demo", "--accel", "tcg"]
    command += ["--device", "virtio", "--copy", str(source)]
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "200"}
    demo = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    try:
        # A table's cells may be broken over lines.
        said = " ".join(read_until(master, b"(exit)").decode(errors="replace").split())
        assert "FAILED" not in said
        same = r"ok 2 files, 0.3 MB in [\d.]+ s, sha256 \w+… at both ends"
        assert len(re.findall(same, said)) == 2, said
        assert "fetch a page from inside ok" in said
        os.write(master, b"cat '/srv/copied/empty'; ls /sys/class/net; echo $((6 * 7))-; tty\n")
        there = read_until(master, b"/dev/pts/")
        assert b"lo 42- /dev/pts/" in b" ".join(there.split())
        os.write(master, b"exit\n")
        assert demo.wait(60) == 0
        assert termios.tcgetattr(master) == before
    finally:
        demo.kill()
        demo.wait()
        os.close(master)


