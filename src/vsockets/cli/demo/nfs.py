"""``vsock demo nfs``: guests share a folder of the host over datagrams (figure 1-2)."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...attachment import Attachment
from ...nfs import preflight
from ..errors import CliError
from .command import Step, progress
from .stage import PATIENCE, VSOCK

if TYPE_CHECKING:
    from .stage import Program, Stage

#: Size of the file that one guest writes, in bytes.
SIZE = 8 << 20


def play(stage: Stage, show_progress: bool) -> tuple[list[Step], dict[str, Any]]:
    """Run the demo.

    Raises CliError if a program or library that the demo needs is missing.
    """
    preflight.check()
    if shutil.which("fusermount3") is None:
        raise CliError("fusermount3 is missing, which unmounts folders: apt install fuse3")
    with tempfile.TemporaryDirectory(prefix="vsock-nfs-") as scratch:
        demo = _Demo(stage, Path(scratch))
        try:
            return demo.play(show_progress)
        finally:
            demo.unmount()


class _Demo:
    def __init__(self, stage: Stage, scratch: Path) -> None:
        self._stage, self._scratch = stage, scratch
        self._export = scratch / "export"
        self._export.mkdir()
        self._mounted: list[Path] = []
        self._writer, self._reader, self._refused = (stage.fabric.guest() for _ in range(3))

    def play(self, show_progress: bool) -> tuple[list[Step], dict[str, Any]]:
        server = self._serve()
        with progress("two guests mount the host's folder", 1, show_progress):
            written, read = self._mount(self._writer), self._mount(self._reader)
        data = os.urandom(SIZE)
        began = time.monotonic()
        half = SIZE // 2
        with open(written / "file", "wb") as file:
            file.write(data[:half])
            server.end()
            server = self._serve()
            file.write(data[half:])
        seconds = time.monotonic() - began
        digest = hashlib.sha256(data).hexdigest()
        steps = [
            Step(
                "server killed in between",
                f"guest {self._writer.cid} writes",
                _digest(self._export / "file") == digest,
                f"{SIZE / 1e6:.0f} MB in {seconds:.1f} s, sha256 {digest[:12]}… on the host",
            ),
            Step(
                "the same file",
                f"guest {self._reader.cid} reads",
                _digest(read / "file") == digest,
                "the same bytes",
            ),
            self._refuse(),
        ]
        return steps, {"bytes": SIZE, "seconds": round(seconds, 2)}

    def unmount(self) -> None:
        """Unmount every folder, which ends the process that serves it."""
        for folder in self._mounted:
            subprocess.run(["fusermount3", "-u", "-z", folder], capture_output=True, check=False)

    def _serve(self) -> Program:
        host = self._stage.fabric.host
        cids = f"{self._writer.cid}:{self._reader.cid}"
        command = [
            *(*VSOCK, "nfs", "serve", "--listen=vsock-dgram::2049"),
            *(
                f"--state={self._scratch}/state",
                f"--export={self._export},no-root-squash,cid={cids}",
            ),
        ]
        program = self._stage.run("nfs serve", command, self._stage.fabric.environment(host))
        program.read_address()
        return program

    def _mount(self, guest: Attachment) -> Path:
        folder = self._scratch / str(guest.cid)
        folder.mkdir()
        command = [*VSOCK, "nfs", "mount", "vsock-dgram:2:2049", f"{self._export}", f"{folder}"]
        self._mounted.append(folder)
        self._stage.run("nfs mount", command, self._stage.fabric.environment(guest))
        deadline = time.monotonic() + PATIENCE
        while not os.path.ismount(folder):
            if time.monotonic() > deadline:
                raise CliError(f"guest {guest.cid} did not mount within {PATIENCE:g} s")
            time.sleep(0.05)
        return folder

    def _refuse(self) -> Step:
        cid = self._refused.cid
        environment = self._stage.fabric.environment(self._refused)
        command = [*VSOCK, "nfs", "mount", "vsock-dgram:2:2049", f"{self._export}", "/"]
        asked = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        message = asked.stderr.strip().rpartition(": ")[2]
        ok = asked.returncode == 1 and message == "Permission denied"
        return Step("not exported to it", f"guest {cid} mounts", ok, f"refused: {message}")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
