"""Virtual machines: the virtio device beside its peers, in guests that run at the same time.

    python -m bench.machines [--rounds N] [--kernel stable|newest] [--only NAME,NAME]

Each contestant has a guest of its own, with the same kernel and the same programs, and one after
another is measured, round after round.  What a contestant's own process used is read from
``/proc``.  QEMU and kernels come from Debian as for ``tests/vm``, and so does the Rust back end.
Slow: some minutes.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import vsockets
from vsockets.testing import PrivateFabric, wait_until

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from vm import downloads, image
from vm.conftest import COMMON
from vm.machine import Machine
from vm.rust_machine import RustMachine

_TICKS = os.sysconf("SC_CLK_TCK")
_PATIENCE = 60.0

_SEND = """
s = connect(port); b = bytes(step); n = total
while n: n -= s.send(b[:n])
s.recv(1)
"""
_RECEIVE = """
l = listener(port); s = l.accept()[0]; b = bytearray(1 << 18); n = 0
while n < total: n += s.recv_into(b)
s.send(b'!'); s.close(); l.close()
"""
_PING = """
s = connect(port); b = bytes(64); times = []
for i in range(number):
    begin = time.perf_counter(); s.send(b); s.recv(64); times.append(time.perf_counter() - begin)
result = sorted(times)[number // 2] * 1e6
"""
_CONNECTS = """
begin = time.perf_counter()
for i in range(number):
    s = connect(port); s.close()
result = number / (time.perf_counter() - begin)
"""


class Ours:
    """``vsock device``, through vsockd as always."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    @property
    def pid(self) -> int:
        assert self.machine.device is not None
        return self.machine.device.pid

    def listen(self) -> tuple[Any, int]:
        address = (vsockets.VMADDR_CID_HOST, vsockets.VMADDR_PORT_ANY)
        server = vsockets.create_server(address, context=self.machine.host)
        return server, server.getsockname()[1]

    def connect(self, port: int) -> Any:
        return vsockets.create_connection((self.machine.cid, port), context=self.machine.host)


class Hybrid(Ours):
    """Debian's ``vhost-device-vsock``: the host's side is a unix socket with a handshake."""

    _ports = iter(range(20_000, 60_000))

    @property
    def _path(self) -> str:
        assert isinstance(self.machine, RustMachine)
        return str(self.machine.uds_path)

    def listen(self) -> tuple[Any, int]:
        port = next(self._ports)
        server = socket.socket(socket.AF_UNIX)
        server.bind(f"{self._path}_{port}")
        server.listen(128)
        return server, port

    def connect(self, port: int) -> Any:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self._path)
        sock.send(b"CONNECT %d\n" % port)
        if not sock.recv(32).startswith(b"OK"):
            sock.close()
            raise ConnectionResetError
        return sock


def _processor_time(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def to_host(who: Ours, step: int, total: int) -> tuple[float, float]:
    """MB/s and processor seconds a GB from the guest to the host, in writes of ``step``."""
    server, port = who.listen()
    with server:
        job = who.machine.start(_SEND, port=port, step=step, total=total)
        sock, _ = server.accept()
        with sock:
            before, begin = _processor_time(who.pid), time.perf_counter()
            buffer, left = bytearray(1 << 18), total
            while left:
                left -= sock.recv_into(buffer)
            seconds = time.perf_counter() - begin
            used = _processor_time(who.pid) - before
            sock.send(b"!")
            job.result(_PATIENCE)
    return total / seconds / 1e6, used / total * 1e9


def to_guest(who: Ours, step: int, total: int) -> tuple[float, float]:
    """The same from the host to the guest."""
    job = who.machine.start(_RECEIVE, port=6000, total=total)
    with _dial(who, 6000) as sock:
        before, begin = _processor_time(who.pid), time.perf_counter()
        block, left = bytes(step), total
        while left:
            left -= sock.send(block[:left])
        sock.recv(1)
        seconds = time.perf_counter() - begin
        used = _processor_time(who.pid) - before
    job.result(_PATIENCE)
    return total / seconds / 1e6, used / total * 1e9


def ping(who: Ours, number: int) -> tuple[float, float]:
    """Microseconds of a round trip of 64 bytes, and of the device's processor."""
    server, port = who.listen()
    with server:
        job = who.machine.start(_PING, port=port, number=number)
        sock, _ = server.accept()
        with sock:
            before = _processor_time(who.pid)
            for _ in range(number):
                sock.send(sock.recv(64))
            used = _processor_time(who.pid) - before
            return job.result(_PATIENCE), used / number * 1e6


def connects(who: Ours, number: int) -> tuple[float, float]:
    """Connects a second of the guest, and microseconds of the device's processor for each."""
    server, port = who.listen()
    with server:
        before = _processor_time(who.pid)
        job = who.machine.start(_CONNECTS, port=port, number=number)
        for _ in range(number):
            server.accept()[0].close()
        return job.result(_PATIENCE), (_processor_time(who.pid) - before) / number * 1e6


def _dial(who: Ours, port: int) -> Any:
    found = []

    def try_it() -> bool:
        try:
            found.append(who.connect(port))
        except ConnectionResetError:
            return False
        return True

    wait_until(try_it, "the guest to listen", _PATIENCE)
    return found[0]


#: name, units, what to call with a contestant
_BENCHMARKS: list[tuple[str, str, Callable[[Ours], tuple[float, float]]]] = [
    ("guest to host, 64 KiB", "MB/s, s/GB", lambda who: to_host(who, 65_536, 128 << 20)),
    ("guest to host, 4 KiB", "MB/s, s/GB", lambda who: to_host(who, 4096, 32 << 20)),
    ("host to guest, 64 KiB", "MB/s, s/GB", lambda who: to_guest(who, 65_536, 64 << 20)),
    ("host to guest, 4 KiB", "MB/s, s/GB", lambda who: to_guest(who, 4096, 64 << 20)),
    ("round trip, 64 B", "us, us of the device", lambda who: ping(who, 1000)),
    ("connects", "a second, us of the device", lambda who: connects(who, 500)),
]


@contextmanager
def _contestants(names: list[str], kernel: str) -> Iterator[dict[str, Ours]]:
    linux = downloads.kernel(kernel)
    with ExitStack() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vm-", dir="/tmp")))
        fabric = stack.enter_context(PrivateFabric())
        contestants: dict[str, Ours] = {}
        for name in names:
            folder = top / name
            folder.mkdir()
            device = "vmci" if name == "vmci" else "virtio"
            initrd = folder / "initrd"
            initrd.write_bytes(image.build(linux, device))
            kind = RustMachine if name == "rust" else Machine
            machine = stack.enter_context(kind(fabric, linux, initrd, folder, device=device))
            machine.run(COMMON)
            contestants[name] = Hybrid(machine) if name == "rust" else Ours(machine)
        yield contestants


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.machines", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kernel", choices=["stable", "newest"], default="stable")
    parser.add_argument("--only", default="virtio,rust,vmci", help="%(default)s")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    with _contestants(names, arguments.kernel) as contestants:
        for title, units, measure in _BENCHMARKS:
            figures: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
            for number in range(arguments.rounds):
                for name in names if number % 2 else reversed(names):
                    figures[name].append(measure(contestants[name]))
            print(f"{title} ({units})")
            for name in names:
                rates, costs = zip(*figures[name], strict=True)
                beside = zip(figures[names[0]], figures[name], strict=True)
                ratios = [(a[0] / b[0], a[1] / max(b[1], 1e-9)) for a, b in beside]
                print(
                    f"  {name:8} {statistics.median(rates):8.1f} {statistics.median(costs):8.2f}"
                    f"   {names[0]} : {name} = "
                    + ", ".join(f"{statistics.median(r):.2f}" for r in zip(*ratios, strict=True)),
                    flush=True,
                )


if __name__ == "__main__":
    main()
