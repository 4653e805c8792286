"""``vsock vm demo`` on a terminal."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from vsockets.vm import guest_image

from .conftest import Stage

#: Replacements of the guest's agent: its first process ends at once, or during the demo.
PANICS = {
    "boot": "PAGE_PORT = COMMAND_PORT = ROOT = 0\n",
    "later": """
from .real_guest import *
from .real_guest import serve_command, _accept
def crash(sock, peer):
    with open("/proc/sysrq-trigger", "w") as file: file.write("c")
_serve_one, served = serve_command, []
def once(sock, peer):
    served.append(peer)
    (crash if len(served) > 1 else _serve_one)(sock, peer)
if __name__ == "__main__":
    _accept(COMMAND_PORT, once)
""",
}

pytestmark = pytest.mark.timeout(240)


def read_until(terminal: int, text: bytes) -> bytes:
    """Return the output up to ``text``."""
    output = b""
    while text not in output:
        try:
            data = os.read(terminal, 65_536)
        except OSError:  # EIO: the last process on the terminal has ended
            data = b""
        assert data, output.decode(errors="replace")
        output += data
    return output


def test_demo_with_its_shell(stage: Stage, tmp_path: Path) -> None:
    """Run the whole demo; then use its shell, which can reach the page inside the guest."""
    stage.parts("stable", "virtio")  # skips without QEMU
    source = tmp_path / "what to copy"
    (source / "a folder").mkdir(parents=True)
    (source / "a folder" / "a file").write_bytes(os.urandom(300_000))
    (source / "empty").touch()
    master, slave = pty.openpty()
    before = termios.tcgetattr(master)
    command = [sys.executable, "-m", "vsockets.cli", "vm", "demo", "--accel", "tcg"]
    command += ["--device", "virtio", "--copy", str(source)]
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "200"}
    demo = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    try:
        # Table cells may be wrapped.
        output = " ".join(read_until(master, b"(exit)").decode(errors="replace").split())
        assert "FAILED" not in output
        same = r"ok 2 files, 0.3 MB in [\d.]+ s, sha256 \w+… at both ends"
        assert len(re.findall(same, output)) == 2, output
        assert "fetch a page of the guest ok" in output
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


@pytest.mark.parametrize("broken", ["boot", "later"])
def test_guest_panic_ends_the_demo(stage: Stage, tmp_path: Path, broken: str) -> None:
    """The demo ends at once and shows the last console output of the guest."""
    stage.parts("stable", "virtio")  # skips without QEMU
    # The guest runs a modified copy of this package.
    package = tmp_path / "vsockets"
    shutil.copytree(guest_image.PACKAGE, package)
    shutil.copy(package / "vm/guest_agent.py", package / "vm/real_guest.py")
    (package / "vm/guest_agent.py").write_text(PANICS[broken])
    command = [sys.executable, "-m", "vsockets.cli", "vm", "demo", "--accel", "tcg"]
    done = subprocess.run(
        [*command, "--device", "virtio", "--json"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1
    assert "vsock: the guest has ended: " in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "Kernel panic - not syncing: " in last
    assert done.stdout == ""
