"""Devices in virtual machines and their peers, in guests that run at the same time.

    python -m bench.machines [--rounds N] [--kernel stable|newest] [--only NAME,NAME] [--real-time]

Each contestant has its own guest, with the same kernel and the same programs.  Contestants are
measured in turn, round by round.  The processor time of a contestant's process is read from
``/proc``.  QEMU and kernels come from Debian as for ``tests/vm``, and so does the Rust back end.
``tcp`` is QEMU's user network, which runs in QEMU's process: its processor time includes the
guest's.  A run takes some minutes.

On a busy machine ``--real-time`` gives all processes of the benchmark real-time priority while they
are measured, for about a second at a time.  It needs CAP_SYS_NICE.
"""

from __future__ import annotations

import argparse
import itertools
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import vsockets
from conformance.kernel_suite import free_port
from vm import downloads, image
from vm.conftest import COMMON, NETWORK_UP, network_card
from vm.machine import Machine
from vm.rust_machine import RustMachine
from vsockets.testing import PrivateFabric, wait_until

_PATIENCE = 60.0
_RECEIVING = 6000  #: the guest's port

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
s = connect(port); b = bytes(64)
for i in range(number): s.send(b); s.recv(64)
"""
_CONNECTS = """
for i in range(number):
    s = connect(port); s.close()
"""


_SEND_DATAGRAMS = """
s = dgram(); b = bytes(64)
for i in range(number): s.sendto(b, (HOST, port))
"""
#: Definitions that let the guest's programs use TCP instead of vSockets.
_TCP = """
import socket
HOST = "10.0.2.2"
def stream(): return socket.socket(socket.AF_INET)
def dgram(): return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
def listener(port):
    s = stream(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind(("", port)); s.listen(); return s
def connect(port):
    s = stream(); s.connect((HOST, port)); s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return s
common = True
"""


class Contestant:
    """A guest with one of vsockets' devices; the base of the other contestants."""

    @property
    def has_datagrams(self) -> bool:
        """Return whether the device has datagrams, which virtio-vsock lacks."""
        return self.machine.kind == "vmci"

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

    def receive_datagrams(self) -> tuple[Any, int]:
        """Return a bound datagram socket and its port."""
        sock = vsockets.socket(type=socket.SOCK_DGRAM, context=self.machine.host)
        sock.bind((vsockets.VMADDR_CID_HOST, vsockets.VMADDR_PORT_ANY))
        return sock, sock.getsockname()[1]


class Tcp(Contestant):
    """A guest with a network card on QEMU's user network."""

    has_datagrams = True

    def __init__(self, machine: Machine, port: int) -> None:
        """Set up the guest's network; ``port`` of the host is forwarded to the guest."""
        super().__init__(machine)
        self._port = port
        machine.run(NETWORK_UP, modules=image.NETWORK)
        machine.run(_TCP)

    @property
    def pid(self) -> int:
        assert self.machine.qemu is not None
        return self.machine.qemu.pid

    def listen(self) -> tuple[Any, int]:
        server = socket.create_server(("127.0.0.1", 0))
        return server, server.getsockname()[1]

    def connect(self, port: int) -> Any:
        # QEMU accepts the connection even if the guest does not listen.
        row = f":{port:04X} 00000000:0000 0A"
        if not self.machine.run("result = row in open('/proc/net/tcp').read()", row=row):
            raise ConnectionResetError
        sock = socket.create_connection(("127.0.0.1", self._port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def receive_datagrams(self) -> tuple[Any, int]:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", 0))
        return sock, sock.getsockname()[1]


class Hybrid(Contestant):
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


def processor_time(pid: int) -> float:
    """Return the processor seconds of all threads, from the scheduler's nanosecond counters."""
    used = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        used += int((thread / "schedstat").read_text().split()[0])
    return used / 1e9


def to_host(contestant: Contestant, step: int, total: int) -> tuple[float, float]:
    """Return MB/s and processor seconds per GB from guest to host, in writes of ``step`` bytes."""
    server, port = contestant.listen()
    with server:
        job = contestant.machine.start(_SEND, port=port, step=step, total=total)
        sock, _ = server.accept()
        with sock:
            before, begin = processor_time(contestant.pid), time.perf_counter()
            buffer, left = bytearray(1 << 18), total
            while left:
                left -= sock.recv_into(buffer)
            seconds = time.perf_counter() - begin
            used = processor_time(contestant.pid) - before
            sock.send(b"!")
            job.result(_PATIENCE)
    return total / seconds / 1e6, used / total * 1e9


def to_guest(contestant: Contestant, step: int, total: int) -> tuple[float, float]:
    """Return MB/s and processor seconds per GB from host to guest, in writes of ``step`` bytes."""
    job = contestant.machine.start(_RECEIVE, port=_RECEIVING, total=total)
    with _dial(contestant, _RECEIVING) as sock:
        before, begin = processor_time(contestant.pid), time.perf_counter()
        block, left = bytes(step), total
        while left:
            left -= sock.send(block[:left])
        sock.recv(1)
        seconds = time.perf_counter() - begin
        used = processor_time(contestant.pid) - before
    job.result(_PATIENCE)
    return total / seconds / 1e6, used / total * 1e9


def ping(contestant: Contestant, number: int) -> tuple[float, float]:
    """Return the microseconds of a round trip of 64 bytes, and of processor time for each."""
    server, port = contestant.listen()
    with server:
        job = contestant.machine.start(_PING, port=port, number=number)
        sock, _ = server.accept()
        with sock:
            before = processor_time(contestant.pid)
            times = []
            for _ in range(number):
                ping = sock.recv(64)
                times.append(time.perf_counter())
                sock.send(ping)
            used = processor_time(contestant.pid) - before
            job.result(_PATIENCE)
    # By the host's clock: an emulated guest's clock may run at another speed.
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    return statistics.median(pauses) * 1e6, used / number * 1e6


def connects(contestant: Contestant, number: int) -> tuple[float, float]:
    """Return the guest's connects per second, and the microseconds of processor time for each."""
    server, port = contestant.listen()
    with server:
        before = processor_time(contestant.pid)
        job = contestant.machine.start(_CONNECTS, port=port, number=number)
        server.settimeout(_PATIENCE)
        times = []
        for _ in range(number):
            try:
                server.accept()[0].close()
            except TimeoutError:
                break  # the guest's result has the reason
            times.append(time.perf_counter())
        job.result(_PATIENCE)
    rate = (len(times) - 1) / (times[-1] - times[0])
    return rate, (processor_time(contestant.pid) - before) / number * 1e6


def datagrams(contestant: Contestant, number: int) -> tuple[float, float]:
    """Return datagrams of 64 bytes per second from the guest, and processor microseconds each."""
    sock, port = contestant.receive_datagrams()
    with sock:
        sock.settimeout(_PATIENCE)
        before = processor_time(contestant.pid)
        contestant.machine.start(_SEND_DATAGRAMS, port=port, number=number)
        sock.recv(100)
        begin = time.perf_counter()
        sock.settimeout(1)
        received, end = 1, begin
        while received < number:
            try:
                sock.recv(100)
            except TimeoutError:  # UDP may lose some
                break
            received, end = received + 1, time.perf_counter()
        used = processor_time(contestant.pid) - before
        return (received - 1) / max(end - begin, 1e-9), used / received * 1e6


def _dial(contestant: Contestant, port: int) -> Any:
    found = []

    def try_connect() -> bool:
        try:
            found.append(contestant.connect(port))
        except ConnectionResetError:
            return False
        return True

    wait_until(try_connect, "the guest to listen", _PATIENCE)
    return found[0]


#: Name, units and function of each benchmark.
_BENCHMARKS: list[tuple[str, str, Callable[[Contestant], tuple[float, float]]]] = [
    ("guest to host, 64 KiB", "MB/s, s/GB", lambda one: to_host(one, 65_536, 128 << 20)),
    ("guest to host, 4 KiB", "MB/s, s/GB", lambda one: to_host(one, 4096, 32 << 20)),
    ("host to guest, 64 KiB", "MB/s, s/GB", lambda one: to_guest(one, 65_536, 64 << 20)),
    ("host to guest, 4 KiB", "MB/s, s/GB", lambda one: to_guest(one, 4096, 64 << 20)),
    ("round trip, 64 B", "us, us of the device", lambda one: ping(one, 1000)),
    ("connects", "a second, us of the device", lambda one: connects(one, 200)),
    ("datagrams, 64 B", "a second, us of the device", lambda one: datagrams(one, 2000)),
]


@contextmanager
def _contestants(names: list[str], kernel: str) -> Iterator[dict[str, Contestant]]:
    linux = downloads.kernel(kernel)
    with ExitStack() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vm-", dir="/tmp")))
        fabric = stack.enter_context(PrivateFabric())
        contestants: dict[str, Contestant] = {}
        for name in names:
            folder = top / name
            folder.mkdir()
            device = "vmci" if name in ("vmci", "tcp") else "virtio"
            initrd = folder / "initrd"
            initrd.write_bytes(image.build(linux, device))
            kind = RustMachine if name == "rust" else Machine
            port = free_port()
            card = network_card(port, _RECEIVING) if name == "tcp" else ()
            machine = stack.enter_context(
                kind(fabric, linux, initrd, folder, device=device, arguments=card)
            )
            machine.run(COMMON + "HOST = 2")
            match name:
                case "rust":
                    contestants[name] = Hybrid(machine)
                case "tcp":
                    contestants[name] = Tcp(machine, port)
                case _:
                    contestants[name] = Contestant(machine)
        yield contestants


def _family(pid: int) -> Iterator[int]:
    """Yield ``pid`` and the process ids of its descendants."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from _family(int(child))


@contextmanager
def _real_time_priority() -> Iterator[None]:
    """Run this process and its descendants at real-time priority during the with block."""

    def schedule(policy: int, priority: int) -> None:
        for pid in _family(os.getpid()):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setscheduler(int(thread.name), policy, os.sched_param(priority))

    schedule(os.SCHED_RR, 1)
    try:
        yield
    finally:
        schedule(os.SCHED_OTHER, 0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.machines", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kernel", choices=["stable", "newest"], default="stable")
    parser.add_argument(
        "--only", default="vmci,virtio,rust,tcp", help="contestants (default: %(default)s)"
    )
    parser.add_argument(
        "--real-time", action="store_true", help="measure at real-time priority (default: no)"
    )
    arguments = parser.parse_args()
    priority = _real_time_priority if arguments.real_time else nullcontext
    all_names = arguments.only.split(",")
    with _contestants(all_names, arguments.kernel) as contestants:
        for title, units, measure in _BENCHMARKS:
            names = all_names
            if title.startswith("datagrams"):
                names = [name for name in all_names if contestants[name].has_datagrams]
            figures: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
            for number in range(arguments.rounds):
                for name in names if number % 2 else reversed(names):
                    with priority():
                        figures[name].append(measure(contestants[name]))
            print(f"{title} ({units})")
            for name in names:
                rates, costs = zip(*figures[name], strict=True)
                pairs = zip(figures[names[0]], figures[name], strict=True)
                ratios = [(a[0] / b[0], a[1] / max(b[1], 1e-9)) for a, b in pairs]
                print(
                    f"  {name:8} {statistics.median(rates):8.1f} {statistics.median(costs):8.2f}"
                    f"   {names[0]} : {name} = "
                    + ", ".join(f"{statistics.median(r):.2f}" for r in zip(*ratios, strict=True)),
                    flush=True,
                )


if __name__ == "__main__":
    main()
