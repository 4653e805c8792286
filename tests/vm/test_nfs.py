"""An export of the host in a machine, over the VMCI device and the guest kernel's FUSE."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cli.vsock import Running
from nfs.stage import digests
from vsockets.testing import wait_until

from . import downloads
from .machine import Machine

pytestmark = pytest.mark.timeout(300)

#: Timeout in seconds for the guest, which is emulated.
PATIENCE = 120.0

#: The common beginning of the guest programs in these tests.
GUEST = """
import hashlib, subprocess, sys
from pathlib import Path
def client(export):
    command = [sys.executable, "-m", "vsockets.nfs", "vsock-dgram:2:2049", export, "/mnt"]
    environment = {"VSOCKETS_TRANSPORT": "kernel", "PATH": "/bin"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
def load_fuse():  # the newest kernel has it built in
    if os.path.exists("/modules/fuse.ko"): assert not os.system("insmod /modules/fuse.ko")
def forget():
    with open("/proc/sys/vm/drop_caches", "w") as file: file.write("3")
os.makedirs("/mnt", exist_ok=True)
common = True
"""


@pytest.fixture(scope="module")
def guest(machine: Machine) -> Machine:
    """A guest that can mount."""
    machine.put(downloads.storage_client())
    machine.run(GUEST + inspect.getsource(digests))
    machine.run("load_fuse()")
    return machine


class Host:
    """A server, and the directory that it exports to the guest."""

    def __init__(self, guest: Machine, folder: Path) -> None:
        self.export = folder / "export"
        self.export.mkdir()
        self._guest = guest
        self._environment = guest.fabric.environment(guest.host)
        self._state = folder / "state"
        self._server: Running | None = None

    def serve(self, *exports: str) -> None:
        options = [f"--export={export}" for export in exports or [f"{self.export},no-root-squash"]]
        options += ["--listen=vsock-dgram::2049", f"--state={self._state}"]
        self._server = Running(("nfs", "serve", *options), self._environment)
        assert self._server.error_line() == "listening on vsock-dgram:2:2049"

    def kill(self) -> None:
        if self._server is not None:
            self._server.close()

    @contextmanager
    def mounted(self, export: Path | None = None) -> Iterator[None]:
        """Mount the export on the guest's /mnt while the context lasts."""
        start = "sys.client = client(export); result = sys.client.stderr.readline()"
        end = """
            sys.client.terminate()
            result = sys.client.wait(), sys.client.stderr.read(), os.listdir("/mnt")
        """
        output = self._guest.run(start, PATIENCE, export=str(export or self.export))
        assert output == "vsock: mounted on /mnt\n"
        try:
            yield
        finally:
            ended = self._guest.run(end)
        assert ended == (0, "", [])


@pytest.fixture
def host(guest: Machine, tmp_path: Path) -> Iterator[Host]:
    host = Host(guest, tmp_path)
    yield host
    host.kill()


def test_guest_copies_and_changes_a_tree(guest: Machine, host: Host) -> None:
    host.serve()
    host.export.joinpath("greeting").write_text("from the host")
    with host.mounted():
        original, copied = guest.run(
            """
            assert open("/mnt/greeting").read() == "from the host"
            source = Path("/tmp/tree")
            assert not os.system(f"cp -r {Path(os.__file__).parent}/email {source}")
            (source / "large").write_bytes(os.urandom(3 << 20))
            (source / "link").symlink_to("large")
            (source / "empty").mkdir()
            assert not os.system(f"cp -a {source} /mnt/tree")
            forget()
            result = digests(source), digests(Path("/mnt/tree"))
            """,
            PATIENCE,
        )
        assert copied == original
        assert digests(host.export / "tree") == original
        large = host.export / "tree" / "large"
        before = large.read_bytes()
        guest.run('with open("/mnt/tree/large", "ab") as file: file.write(bytes(100_000))')
        assert large.read_bytes() == before + bytes(100_000)
        guest.run('os.truncate("/mnt/tree/large", 70_001)')
        assert large.read_bytes() == before[:70_001]
        guest.run('os.rename("/mnt/tree/large", "/mnt/renamed")')
        assert not large.exists()
        assert (host.export / "renamed").read_bytes() == before[:70_001]
        guest.run('os.unlink("/mnt/renamed"); assert not os.system("rm -r /mnt/tree")')
        assert os.listdir(host.export) == ["greeting"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as others")
@pytest.mark.parametrize("machine", ["stable"], indirect=True)
def test_permissions_of_a_guest(guest: Machine, host: Host, tmp_path: Path) -> None:
    """vsockd vouches for the guest's CID, and root in the guest is an ordinary user here."""
    others, read_only = tmp_path / "others", tmp_path / "read-only"
    for folder in (others, read_only):
        folder.mkdir()
    host.serve(
        f"{host.export},cid={guest.cid}",
        f"{others},cid={guest.cid + 1}",
        f"{read_only},ro,cid={guest.cid}",
    )
    refused = guest.run("result = client(export).communicate()[1]", PATIENCE, export=str(others))
    assert refused == f"vsock: {others}: Permission denied\n"
    common, private = host.export / "common", host.export / "private"
    common.mkdir()
    common.chmod(0o777)
    private.write_text("the host's")
    private.chmod(0o600)
    with host.mounted():
        result = guest.run(
            """
            def attempt(program, user):
                done = subprocess.run(["/bin/sh", "-c", program], user=user, capture_output=True)
                return done.returncode == 0, done.stderr.decode().rpartition(": ")[2].strip()
            result = [
                attempt("cat /mnt/private", 0),
                attempt("touch /mnt/file", 0),
                attempt("chmod 666 /mnt/private", 0),
                attempt("touch /mnt/common/of-root", 0),
                attempt("umask 77; touch /mnt/common/of-1000", 1000),
                attempt("cat /mnt/common/of-1000", 1001),
                attempt("cat /mnt/common/of-1000", 1000),
            ]
            """
        )
    assert result == [
        (False, "Permission denied"),
        (False, "Permission denied"),
        (False, "Operation not permitted"),
        *[(True, "")] * 2,
        (False, "Permission denied"),
        (True, ""),
    ]
    assert {path.name: path.stat().st_uid for path in common.iterdir()} == {
        "of-root": 65_534,
        "of-1000": 1000,
    }
    with host.mounted(read_only):
        output = guest.run(
            """
            try: Path("/mnt/file").touch()
            except OSError as error: result = error.strerror
            """
        )
    assert output == "Read-only file system"


def test_copy_survives_death_of_the_server(guest: Machine, host: Host) -> None:
    host.serve()
    with host.mounted():
        copying = guest.start(
            """
            source = Path("/tmp/source")
            for number in range(40):
                path = source / str(number) / "file"
                path.parent.mkdir(parents=True)
                path.write_bytes(os.urandom(1000 + 5000 * number))
            assert not os.system(f"cp -r {source} /mnt/copy")
            forget()
            result = digests(source), digests(Path("/mnt/copy"))
            assert not os.system(f"rm -r {source}")
            """
        )
        arrived = functools.partial(host.export.glob, "copy/*/file")
        wait_until(lambda: len(list(arrived())) > 9, "the copy to get on", PATIENCE)
        host.kill()
        assert len(list(arrived())) < 40  # the copy was interrupted
        host.serve()
        original, copied = copying.result(PATIENCE)
    assert copied == original == digests(host.export / "copy")


def test_random_writes_are_read_back(guest: Machine, host: Host) -> None:
    """Threads write, truncate and read at random offsets; each has a model of its file."""
    host.serve()
    with host.mounted():
        expected = guest.run(
            """
            import random
            from concurrent.futures import ThreadPoolExecutor
            def work(number):
                chance, model = random.Random(number), bytearray()
                with open(f"/mnt/{number}", "w+b", buffering=0) as file:
                    for _ in range(60):
                        at, size = chance.randrange(1 << 19), chance.randrange(1 << 17)
                        choice = chance.random()
                        if choice < 0.1:
                            del model[at:]
                            file.truncate(len(model))
                        elif choice < 0.8:
                            data = chance.randbytes(size)
                            os.pwrite(file.fileno(), data, at)
                            model.extend(bytes(max(0, at + size - len(model))))
                            model[at:at + size] = data
                        else:
                            assert os.pread(file.fileno(), size, at) == model[at:at + size]
                forget()
                assert Path(f"/mnt/{number}").read_bytes() == model
                return str(number), hashlib.sha256(model).hexdigest()
            with ThreadPoolExecutor(4) as pool: result = dict(pool.map(work, range(4)))
            """,
            PATIENCE,
        )
    assert digests(host.export) == expected and len(expected) == 4


@pytest.mark.parametrize("machine", ["stable"], indirect=True)
def test_kernel_without_fuse(guest: Machine, host: Host) -> None:
    assert not guest.run('result = os.system("rmmod fuse")')
    try:
        output = guest.run("result = client('/none').communicate()[1]", PATIENCE)
    finally:
        guest.run("load_fuse()")
    assert output.startswith("vsock: /dev/fuse: No such file or directory; modprobe fuse")
    assert output.count("\n") == 1
