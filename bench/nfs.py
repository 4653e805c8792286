"""A folder over vSockets datagrams beside one over UDP, with the same server, client and disk.

And beside a server that nobody here wrote: Debian's nfs-ganesha, over UDP, with the same client.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

from vsockets.testing import PrivateFabric

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from nfs.ganesha import MOUNT_PORT, PORT, PrivateGanesha
from vm import downloads

_BLOCK = bytes(1 << 20)


def available() -> bool:
    """Whether folders can be mounted here."""
    programs = shutil.which("fusermount3"), shutil.which("ip"), shutil.which("nsenter")
    mountable = os.geteuid() == 0 and os.access("/dev/fuse", os.R_OK | os.W_OK)
    return mountable and all(programs) and importlib.util.find_spec("pyfuse3") is not None


@contextlib.contextmanager
def mounted() -> Iterator[dict[str, Path]]:
    """Folders that are mounted, each from an export of its own, by the way there."""
    with contextlib.ExitStack() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vsock-nfs-")))
        fabric = stack.enter_context(PrivateFabric(log_level="warning"))
        here = fabric.environment(fabric.host)
        folders: dict[str, Path] = {}

        def start(command: tuple[str, ...], environment: dict[str, str]) -> str:
            process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            assert process.stderr is not None
            return process.stderr.readline().strip()

        def export(name: str) -> Path:
            folder = top / f"{name}-export"
            folder.mkdir()
            return folder

        def serve(name: str, listen: str) -> str:
            folder = f"--export={export(name)},no-root-squash"
            options = f"--listen={listen}", folder, f"--state={top / name}-state"
            said = start((*nfs, "serve", *options), here)
            return said.removeprefix("vsock: listening on ")

        def mount(name: str, command: tuple[str, ...], environment: dict[str, str]) -> None:
            folder = folders[name] = top / name
            folder.mkdir()
            said = start((*command, str(top / f"{name}-export"), str(folder)), environment)
            assert "mounted on" in said, said
            stack.callback(lambda: subprocess.run(["umount", "-l", folder], check=True))

        nfs = (sys.executable, "-m", "vsockets.cli", "nfs")
        server = serve("vsock", "vsock-dgram::2049")
        mount("vsock", (*nfs, "mount", server), fabric.environment(fabric.guest()))
        server = serve("udp", "udp:127.0.0.1:0")
        mount("udp", (*nfs, "mount", server), here)
        with contextlib.suppress(downloads.Unavailable):
            private = PrivateGanesha(downloads.ganesha(), top, export("ganesha"))
            ganesha = stack.enter_context(private)
            servers = f"udp:127.0.0.1:{PORT}", f"--mount-server=udp:127.0.0.1:{MOUNT_PORT}"
            mount("ganesha", ganesha.in_namespace(*nfs, "mount", *servers), here)
        yield folders


def writing(folder: Path, count: int) -> float:
    """A new file of ``count`` MiB until it is on the server's disk, in MB/s."""
    begin = perf_counter()
    with open(folder / "large", "wb", buffering=0) as file:
        for _ in range(count):
            file.write(_BLOCK)
        os.fsync(file.fileno())
    return count * len(_BLOCK) / (perf_counter() - begin) / 1e6


def reading(folder: Path, count: int) -> float:
    """A file of ``count`` MiB that is in the server's memory and not in the client's, in MB/s."""
    if not (folder / "large").exists():
        writing(folder, count)
    with open(folder / "large", "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin, left = perf_counter(), count * len(_BLOCK)
        while left:
            left -= len(file.read(len(_BLOCK)))
        return count * len(_BLOCK) / (perf_counter() - begin) / 1e6


def creating(folder: Path, count: int) -> float:
    """Files of 4 KiB, made and removed, a second."""
    begin = perf_counter()
    for number in range(count):
        (folder / str(number)).write_bytes(_BLOCK[:4096])
    for number in range(count):
        (folder / str(number)).unlink()
    return count / (perf_counter() - begin)
