"""Helpers for tests that mount: a server, mounts in guests, and digests of directories."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vsockets.attachment import Attachment
from vsockets.testing import PrivateFabric

NEEDS_MOUNTING = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(
        os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK),
        reason="mounting needs root and /dev/fuse",
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("pyfuse3") is None or shutil.which("fusermount3") is None,
        reason="pyfuse3 or fusermount3 is not installed",
    ),
]

VSOCK = (sys.executable, "-m", "vsockets.cli")
NFS = (*VSOCK, "nfs")
PATIENCE = 60.0


class Program:
    """A program that prints a line when it is ready."""

    def __init__(self, command: tuple[str, ...], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        self.line = self.process.stdout.readline().decode() if readable else "(nothing)"

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()


class Storage:
    """A server on the host, and its mounts in guests."""

    def __init__(self, fabric: PrivateFabric, folder: Path) -> None:
        self.export = folder / "export"
        self.export.mkdir()
        self._fabric, self._folder = fabric, folder
        self._mounted: list[tuple[Program, Path]] = []
        self._server: Program | None = None

    def serve(self, *options: str) -> None:
        state = self._folder / "state"
        self._start(
            *(*NFS, "serve", "--listen", "vsock-dgram::2049", "--state", str(state)),
            *(f"--export={self.export}{option}" for option in options or (",no-root-squash",)),
        )

    def serve_with_loss(self, seed: int, percent: int) -> None:
        program = Path(__file__).with_name("lossy_server.py")
        export = f"{self.export},no-root-squash"
        state = str(self._folder / "state")
        self._start(sys.executable, str(program), export, state, "2049", str(seed), str(percent))

    def kill_server(self) -> None:
        assert self._server is not None
        self._server.end(signal.SIGKILL)

    def mount(self, guest: Attachment) -> Path:
        folder = self._folder / f"mounted-{len(self._mounted)}"
        folder.mkdir()
        program = Program(
            (*NFS, "mount", "vsock-dgram:2:2049", str(self.export), str(folder)),
            self._fabric.environment(guest),
        )
        self._mounted.append((program, folder))
        assert "mounted on" in program.line, program.line
        return folder

    def refused(self, guest: Attachment) -> str:
        program = Program(
            (*NFS, "mount", "vsock-dgram:2:2049", str(self.export), str(self._folder)),
            self._fabric.environment(guest),
        )
        program.end()
        return program.line.strip()

    def close(self) -> None:
        for program, folder in self._mounted:
            # Lazily, so that files left open by a failed test do not block this.
            subprocess.run(["umount", "-l", folder], capture_output=True, check=False)
            program.end()
        if self._server is not None:
            self._server.end()

    def _start(self, *command: str) -> None:
        self._server = Program(command, self._fabric.environment(self._fabric.host))
        assert "listening" in self._server.line or "ready" in self._server.line, self._server.line


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below ``folder``, and the targets of links, by path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found
