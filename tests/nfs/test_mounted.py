"""Mounted exports in guests, used by programs."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest

from vsockets.testing import PrivateFabric, wait_until

from .stage import NEEDS_MOUNTING, PATIENCE, Storage, digests

pytestmark = NEEDS_MOUNTING


def test_guests_mount_with_their_permissions(storage: tuple[PrivateFabric, Storage]) -> None:
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


def test_open_sees_what_another_guest_has_closed(
    storage: tuple[PrivateFabric, Storage],
) -> None:
    """Uses open and read only: a query of the size would refresh the cache."""
    fabric, nfs = storage
    nfs.serve()
    writer, reader = (nfs.mount(fabric.guest()) / "file" for _ in range(2))
    for content in (b"one", b"two", b"longer", b"short"):
        writer.write_bytes(content)
        file = os.open(reader, os.O_RDONLY)
        assert os.read(file, 100) == content
        os.close(file)


def test_attributes_after_a_write(storage: tuple[PrivateFabric, Storage]) -> None:
    """The client has them from the reply to the write, for a second and until another change."""
    fabric, nfs = storage
    nfs.serve()
    top, other = (nfs.mount(fabric.guest()) for _ in range(2))
    with open(top / "file", "wb", buffering=0) as file:

        def state() -> tuple[int, int, int]:
            found = os.fstat(file.fileno())
            return found.st_size, found.st_nlink, stat.S_IMODE(found.st_mode)

        file.write(b"one")
        assert state() == (3, 1, 0o644)
        file.write(b"two")
        os.link(top / "file", top / "link")
        assert state() == (6, 2, 0o644)
        file.write(b"three")
        os.unlink(top / "link")
        assert state() == (11, 1, 0o644)
        file.write(b"four")
        os.fchmod(file.fileno(), 0o600)
        assert state() == (15, 1, 0o600)
        file.truncate(2)
        assert state() == (2, 1, 0o600)
        file.write(b"five")  # behind the end
        assert state() == (19, 1, 0o600)
        (other / "file").write_bytes(b"of another guest")
        wait_until(lambda: state()[0] == len("of another guest"))


def test_unix_file_semantics(storage: tuple[PrivateFabric, Storage]) -> None:
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
    assert not os.listdir(top)  # the silly-renamed file is removed as well
    (top / "old").write_text("old")
    with open(top / "new", "w") as file:
        os.rename(top / "old", top / "new")
        file.write("replaced")
    assert (top / "new").read_text() == "old" and os.listdir(top) == ["new"]
    os.link(top / "new", top / "link")
    assert os.stat(top / "link").st_nlink == 2
    os.symlink("new", top / "symbolic")
    assert (top / "symbolic").read_text() == "old"
    os.mkfifo(top / "fifo", 0o640)
    assert os.stat(top / "fifo").st_mode & 0o7777 == 0o640
    os.chown(top / "new", 1234, 2345)
    os.utime(top / "new", ns=(1_000_000_001, 2_000_000_003))
    status = os.stat(top / "new")
    assert (status.st_uid, status.st_gid) == (1234, 2345)
    assert (status.st_atime_ns, status.st_mtime_ns) == (1_000_000_001, 2_000_000_003)
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


def test_copy_survives_loss_and_death_of_the_server(
    storage: tuple[PrivateFabric, Storage], tmp_path: Path
) -> None:
    """A copy runs while one datagram in twenty is lost and the server is killed."""
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
    while not list(nfs.export.glob("copy/*.py")):  # in the middle of the copy
        assert time.monotonic() < deadline and copying.poll() is None
        time.sleep(0.01)
    nfs.kill_server()
    nfs.serve_with_loss(seed=2, percent=5)
    assert copying.wait(PATIENCE * 2) == 0
    expected = digests(original)
    assert digests(nfs.export / "copy") == expected
    assert digests(top / "copy") == expected


def test_attribute_changes_by_a_user_who_is_not_owner(
    storage: tuple[PrivateFabric, Storage],
) -> None:
    """Writing clears set-user-ID; a user with write permission may set the current time only."""
    fabric, nfs = storage
    nfs.serve()
    top = nfs.mount(fabric.guest())

    def unprivileged(script: str) -> int:
        command = ["sh", "-c", script]
        ran = subprocess.run(command, cwd=top, user=65534, capture_output=True, check=False)
        return ran.returncode

    (top / "file").touch()
    os.chmod(top / "file", 0o6777)
    assert unprivileged("echo written >>file") == 0
    assert os.stat(nfs.export / "file").st_mode & 0o7777 == 0o777
    assert (nfs.export / "file").read_text() == "written\n"
    os.utime(top / "file", (1, 1))
    assert unprivileged("touch -d @5 file") != 0 and unprivileged("chmod 700 file") != 0
    assert os.stat(nfs.export / "file").st_mtime == 1
    assert unprivileged("touch file") == 0
    assert os.stat(nfs.export / "file").st_mtime > 5
    os.chmod(top / "file", 0o755)
    assert unprivileged("touch file") != 0


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_fio_verifies_all_data(storage: tuple[PrivateFabric, Storage], tmp_path: Path) -> None:
    fabric, nfs = storage
    nfs.serve_with_loss(seed=3, percent=5)
    top = nfs.mount(fabric.guest())
    command = ["fio", "--name=verify", f"--directory={top}", "--rw=randwrite", "--size=4m"]
    command += ["--bs=4k-64k", "--verify=sha256", "--numjobs=2", "--ioengine=psync"]
    command += ["--fsync_on_close=1", "--end_fsync=1", "--randseed=9"]
    # fio writes its verification state to the working directory.
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
