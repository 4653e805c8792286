"""A host's folder in guests, over vSockets datagrams, as programs see it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vsockets.attachment import Attachment
from vsockets.testing import PrivateFabric

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(
        os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK),
        reason="mounting takes root and /dev/fuse",
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("pyfuse3") is None or shutil.which("fusermount3") is None,
        reason="there is no pyfuse3 or no fusermount3",
    ),
]

VSOCK = (sys.executable, "-m", "vsockets.tools", "nfs")
PATIENCE = 60.0


class Program:
    """A program that says a line when it serves."""

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
    """A server on the host, and guests that mount what it exports."""

    def __init__(self, fabric: PrivateFabric, folder: Path) -> None:
        self.export = folder / "export"
        self.export.mkdir()
        self._fabric, self._folder = fabric, folder
        self._mounted: list[tuple[Program, Path]] = []
        self._server: Program | None = None

    def serve(self, *options: str) -> None:
        state = self._folder / "state"
        self._start(
            *(*VSOCK, "serve", "--listen", "vsock-dgram::2049", "--state", str(state)),
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
            (*VSOCK, "mount", "vsock-dgram:2:2049", str(self.export), str(folder)),
            self._fabric.environment(guest),
        )
        self._mounted.append((program, folder))
        assert "mounted on" in program.line, program.line
        return folder

    def refused(self, guest: Attachment) -> str:
        program = Program(
            (*VSOCK, "mount", "vsock-dgram:2:2049", str(self.export), str(self._folder)),
            self._fabric.environment(guest),
        )
        program.end()
        return program.line.strip()

    def close(self) -> None:
        for program, folder in self._mounted:
            # A lazy one first: what a failed test left open must not hold us up.
            subprocess.run(["umount", "-l", folder], capture_output=True, check=False)
            program.end()
        if self._server is not None:
            self._server.end()

    def _start(self, *command: str) -> None:
        self._server = Program(command, self._fabric.environment(self._fabric.host))
        assert "listening" in self._server.line or "ready" in self._server.line, self._server.line


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[tuple[PrivateFabric, Storage]]:
    with PrivateFabric() as fabric, contextlib.closing(Storage(fabric, tmp_path)) as storage:
        yield fabric, storage


def digests(folder: Path) -> dict[str, str]:
    """Of every file below ``folder``, and where links point to."""
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


def test_three_guests_and_their_rights(storage: tuple[PrivateFabric, Storage]) -> None:
    fabric, nfs = storage
    writer, reader, stranger = (fabric.guest() for _ in range(3))
    nfs.export.joinpath("greeting").write_text("from the host")
    nfs.serve(f",no-root-squash,cid={writer.cid}:{reader.cid}")
    first, second = nfs.mount(writer), nfs.mount(reader)
    assert (first / "greeting").read_text() == "from the host"
    (first / "answer").write_text("from a guest")
    assert (second / "answer").read_text() == "from a guest"
    assert (nfs.export / "answer").read_text() == "from a guest"
    assert "Permission denied" in nfs.refused(stranger)


def test_unix_semantics(storage: tuple[PrivateFabric, Storage]) -> None:
    fabric, nfs = storage
    nfs.serve()
    top = nfs.mount(fabric.guest())
    with open(top / "open", "w+") as file:
        file.write("held")
        file.flush()
        os.unlink(top / "open")
        file.seek(0)
        assert file.read() == "held" and os.fstat(file.fileno()).st_nlink == 0
        assert not (top / "open").exists()
    assert not os.listdir(top)  # what it was called meanwhile is gone, too
    (top / "old").write_text("old")
    with open(top / "new", "w") as file:
        os.rename(top / "old", top / "new")
        file.write("nobody's")
    assert (top / "new").read_text() == "old" and os.listdir(top) == ["new"]
    os.link(top / "new", top / "link")
    assert os.stat(top / "link").st_nlink == 2
    os.symlink("new", top / "symbolic")
    assert (top / "symbolic").read_text() == "old"
    os.mkfifo(top / "fifo", 0o640)
    assert os.stat(top / "fifo").st_mode & 0o7777 == 0o640
    os.chown(top / "new", 1234, 2345)
    os.utime(top / "new", ns=(1_000_000_001, 2_000_000_003))
    told = os.stat(top / "new")
    assert (told.st_uid, told.st_gid) == (1234, 2345)
    assert (told.st_atime_ns, told.st_mtime_ns) == (1_000_000_001, 2_000_000_003)
    os.truncate(top / "new", 1)
    assert (top / "new").read_text() == "o"
    os.mkdir(top / "full")
    (top / "full" / "file").touch()
    with pytest.raises(OSError, match="not empty"):
        os.rmdir(top / "full")
    with pytest.raises(FileExistsError):
        os.open(top / "new", os.O_CREAT | os.O_EXCL)
    with pytest.raises(OSError, match="too long"):
        (top / ("x" * 256)).touch()
    for number in range(150):
        (top / "full" / str(number)).touch()
    assert len(os.listdir(top / "full")) == 151
    assert os.statvfs(top).f_namemax == 255


def test_a_tree_survives_loss_and_the_servers_death(
    storage: tuple[PrivateFabric, Storage], tmp_path: Path
) -> None:
    """A copy, while one datagram in twenty is lost and the server is killed."""
    fabric, nfs = storage
    nfs.serve_with_loss(seed=1, percent=5)
    top = nfs.mount(fabric.guest())
    original = tmp_path / "original"
    shutil.copytree(
        Path(os.__file__).parent / "email", original, ignore=shutil.ignore_patterns("*.pyc")
    )
    (original / "large").write_bytes(os.urandom(3 << 20))
    copying = subprocess.Popen(["cp", "-r", original, top / "copy"])
    deadline = time.monotonic() + PATIENCE
    while not list(nfs.export.glob("copy/*.py")):  # in the middle of it
        assert time.monotonic() < deadline and copying.poll() is None
        time.sleep(0.01)
    nfs.kill_server()
    nfs.serve_with_loss(seed=2, percent=5)
    assert copying.wait(PATIENCE * 2) == 0
    expected = digests(original)
    assert digests(nfs.export / "copy") == expected
    assert digests(top / "copy") == expected


@pytest.mark.skipif(shutil.which("fio") is None, reason="there is no fio")
def test_fio_finds_no_corrupt_byte(storage: tuple[PrivateFabric, Storage]) -> None:
    fabric, nfs = storage
    nfs.serve_with_loss(seed=3, percent=5)
    top = nfs.mount(fabric.guest())
    command = ["fio", "--name=verify", f"--directory={top}", "--rw=randwrite", "--size=4m"]
    command += ["--bs=4k-64k", "--verify=sha256", "--numjobs=2", "--ioengine=psync"]
    command += ["--fsync_on_close=1", "--end_fsync=1", "--randseed=9"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
