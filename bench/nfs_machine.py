"""Reading a file by ``vsock nfs`` in a virtual machine, beside what bounds it there.

    python -m bench.nfs_machine [--rounds N] [--kernel stable|newest]

The guest is emulated, so its processor is the bound of everything it does.  In the same guest and
in turns: a vSockets stream and vSockets datagrams to the guest's kernel, a FUSE file system that
returns zeros from memory, and the mounted export with two sizes of the kernel's read-ahead.  A run
takes about two minutes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from cli.vsock import Running
from vm import downloads, image
from vm.conftest import COMMON
from vm.machine import Machine
from vm.test_nfs import GUEST
from vsockets.testing import PrivateFabric

from .machines import Contestant, processor_time, to_guest

_FILE = 32 << 20
_DATAGRAM, _DATAGRAMS, _IN_FLIGHT = 65_000, 400, 2

_FUSE = """
import asyncio, importlib, stat, sys, pyfuse3
try: importlib.import_module("pyfuse3.asyncio").enable()
except ImportError: importlib.import_module("pyfuse3_asyncio").enable()
ZEROS = bytes(1 << 20)
class Operations(pyfuse3.Operations):
    async def lookup(self, parent, name, ctx): return await self.getattr(2)
    async def getattr(self, inode, ctx=None):
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o755 if inode == 1 else stat.S_IFREG | 0o644
        entry.st_size = int(sys.argv[2])
        entry.entry_timeout = entry.attr_timeout = 1
        return entry
    async def open(self, inode, flags, ctx): return pyfuse3.FileInfo(fh=inode)
    async def read(self, fh, off, size): return ZEROS[:size]
pyfuse3.init(Operations(), sys.argv[1], set(pyfuse3.default_options))
print("ready", flush=True)
asyncio.run(pyfuse3.main())
"""
_PROGRAMS = """
def started(*command):
    environment = {"VSOCKETS_TRANSPORT": "kernel", "PATH": "/bin"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen([sys.executable, *command], env=environment, text=True, **streams)
    return process.stdout.readline()
def read(path):
    n, block = 0, bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while got := file.readinto(block): n += got
    return n
def read_ahead(path, kib):
    device = os.stat(path).st_dev
    name = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
    with open(name, "w") as file: file.write(str(kib))
def fetch(port, number, window):
    s = dgram(); n = sent = 0; b = bytearray(70_000)
    while n < number:
        while sent < number and sent - n < window: s.sendto(bytes(100), (2, port)); sent += 1
        s.recv_into(b); n += 1
common = True
"""


class Measured:
    """The guest, and the processes whose processor time is reported."""

    def __init__(self, machine: Machine, server: Running) -> None:
        assert machine.qemu is not None and machine.device is not None
        self._machine = machine
        self._pids = machine.qemu.pid, machine.device.pid, server.process.pid

    def stream(self) -> int:
        to_guest(Contestant(self._machine), 65_536, 2 * _FILE)
        return 2 * _FILE

    def datagrams(self) -> int:
        """Send datagrams to the guest, each after the guest has asked for it."""
        sock, port = Contestant(self._machine).receive_datagrams()

        def serve() -> None:
            for _ in range(_DATAGRAMS):
                _, guest = sock.recvfrom(100)
                sock.sendto(bytes(_DATAGRAM), guest)

        thread = threading.Thread(target=serve)
        thread.start()
        self._machine.run(
            "fetch(port, number, window)", port=port, number=_DATAGRAMS, window=_IN_FLIGHT
        )
        thread.join()
        sock.close()
        return _DATAGRAM * _DATAGRAMS

    def read(self, path: str, read_ahead: int) -> int:
        """Read a file in the guest with a read-ahead of ``read_ahead`` KiB."""
        folder = str(Path(path).parent)
        self._machine.run("read_ahead(folder, kib)", folder=folder, kib=read_ahead)
        size = self._machine.run("result = read(path)", 120, path=path)
        assert size == _FILE
        return _FILE

    def measure(self, transfer: Callable[[], int]) -> list[float]:
        """Return MB/s, and each process's seconds of processor time for a GB."""
        before, begin = [processor_time(pid) for pid in self._pids], time.perf_counter()
        size = transfer()
        seconds = time.perf_counter() - begin
        used = [processor_time(pid) - then for pid, then in zip(self._pids, before, strict=True)]
        return [size / seconds / 1e6, *(one / size * 1e9 for one in used)]


def _report(measured: Measured, rounds: int) -> None:
    contestants: dict[str, Callable[[], int]] = {
        "vSockets stream": measured.stream,
        "vSockets datagrams of 65,000 bytes": measured.datagrams,
    }
    for kib in (128, 1024):
        for name, path in (("FUSE alone", "/zeros/file"), ("vsock nfs", "/mnt/large")):
            contestants[f"{name}, read-ahead {kib} KiB"] = partial(measured.read, path, kib)
    figures: dict[str, list[list[float]]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name in list(contestants)[:: 1 if number % 2 else -1]:
            row = measured.measure(contestants[name])
            if number:  # the first round warms up
                figures[name].append(row)
    print("to the guest: MB/s; seconds of processor time a GB of QEMU, device, server")
    for name, rows in figures.items():
        columns = [statistics.median(column) for column in zip(*rows, strict=True)]
        print(f"  {name:36}", *(f"{column:8.1f}" for column in columns))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.nfs_machine", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kernel", choices=["stable", "newest"], default="stable")
    arguments = parser.parse_args()
    linux = downloads.kernel(arguments.kernel)
    with ExitStack() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vm-", dir="/tmp")))
        fabric = stack.enter_context(PrivateFabric())
        initrd, export = top / "initrd", top / "export"
        initrd.write_bytes(image.build(linux, "vmci"))
        export.mkdir()
        (export / "large").write_bytes(os.urandom(_FILE))
        machine = stack.enter_context(Machine(fabric, linux, initrd, top))
        machine.run(COMMON)
        machine.put({**downloads.storage_client(), "/zeros.py": _FUSE.encode()})
        machine.run(GUEST + _PROGRAMS)
        machine.run("load_fuse(); os.makedirs('/zeros')")
        options = f"--export={export}", "--listen=vsock-dgram::2049", f"--state={top / 'state'}"
        server = Running(("nfs", "serve", *options), fabric.environment(machine.host))
        stack.callback(server.close)
        server.error_line()
        start = "result = started(*command)"
        command = "/zeros.py", "/zeros", str(_FILE)
        assert machine.run(start, 60, command=command) == "ready\n"
        mount = "-m", "vsockets.nfs", "vsock-dgram:2:2049", str(export), "/mnt"
        assert "mounted on" in machine.run(start, 60, command=mount)
        _report(Measured(machine, server), arguments.rounds)


if __name__ == "__main__":
    main()
