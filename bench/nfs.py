"""NFS over vSockets datagrams and over UDP, with the same server, client and disk.

A third folder is exported by Debian's nfs-ganesha, over UDP, and mounted with the same client.
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

from nfs.ganesha import MOUNT_PORT, PORT, PrivateGanesha
from vm import downloads
from vsockets.testing import PrivateFabric

_BLOCK = bytes(1 << 20)


def available() -> bool:
    """Return whether this process can mount folders."""
    programs = shutil.which("fusermount3"), shutil.which("ip"), shutil.which("nsenter")
    mountable = os.geteuid() == 0 and os.access("/dev/fuse", os.R_OK | os.W_OK)
    return mountable and all(programs) and importlib.util.find_spec("pyfuse3") is not None


@contextlib.contextmanager
def mounted() -> Iterator[dict[str, Path]]:
    """Yield the mounted folders by transport, each from a separate export."""
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
            line = start((*nfs, "serve", *options), here)
            return line.removeprefix("vsock: listening on ")

        def mount(name: str, command: tuple[str, ...], environment: dict[str, str]) -> None:
            folder = folders[name] = top / name
            folder.mkdir()
            line = start((*command, str(top / f"{name}-export"), str(folder)), environment)
            assert "mounted on" in line, line
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
    """Return the MB/s of writing a new file of ``count`` MiB to the server's disk."""
    begin = perf_counter()
    with open(folder / "large", "wb", buffering=0) as file:
        for _ in range(count):
            file.write(_BLOCK)
        os.fsync(file.fileno())
    return count * len(_BLOCK) / (perf_counter() - begin) / 1e6


def reading(folder: Path, count: int) -> float:
    """Return the MB/s of reading a file of ``count`` MiB that only the server has cached."""
    if not (folder / "large").exists():
        writing(folder, count)
    with open(folder / "large", "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin, left = perf_counter(), count * len(_BLOCK)
        while left:
            left -= len(file.read(len(_BLOCK)))
        return count * len(_BLOCK) / (perf_counter() - begin) / 1e6


def creating(folder: Path, count: int) -> float:
    """Return the files of 4 KiB that are created and removed per second."""
    begin = perf_counter()
    for number in range(count):
        (folder / str(number)).write_bytes(_BLOCK[:4096])
    for number in range(count):
        (folder / str(number)).unlink()
    return count / (perf_counter() - begin)
