"""``python -m bench.capacity``: what each context, listener and stream costs a host.

Things are added in large numbers, each kind while those before it stay, and the growth is divided
by the number.  The last lines are processes that a host has once for each machine.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import vsockets
from vsockets import VMADDR_PORT_ANY, Attachment
from vsockets.testing import PrivateFabric, wait_until

from .harness import child, processor_time

_FIRST_PORT = 10_000
_LIMITS = {"sockets": 1_000_000, "request_rate": 1_000_000, "pending_connects": 10_000}
_DESCRIPTORS_LEFT = 1000  #: of a process, for what else it has open
_IDLE_SECONDS = 5


@dataclass
class State:
    """Resources that vsockd and the kernel have in use."""

    bytes: int  #: memory of vsockd alone
    kernel: int  #: the kernel's own memory, in bytes; other programs change it, too
    descriptors: int
    seconds: float  #: processor time of vsockd so far

    @classmethod
    def read(cls, pid: int) -> State:
        """Read the state of the process ``pid`` and of the kernel."""
        return cls(
            memory(pid),
            _field(Path("/proc/meminfo"), "Slab:") * 1024,
            len(os.listdir(f"/proc/{pid}/fd")),
            processor_time(pid),
        )


def memory(pid: int) -> int:
    """Return the bytes of memory of a process, without files; shared memory in equal parts."""
    return _field(Path(f"/proc/{pid}/smaps_rollup"), "Pss_Anon:") * 1024


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise RuntimeError(f"{path} has no {name}")


class Table:
    """Prints a line for each kind of thing."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        print(f"{'':32} {'number':>7} {'time':>8} {'vsockd':>8} {'kernel':>8} {'open':>5}")

    @contextlib.contextmanager
    def row(self, name: str, number: int) -> Iterator[None]:
        """Measure what adds ``number`` things, and print the growth for each of them."""
        before = State.read(self._pid)
        yield
        after = State.read(self._pid)
        print(
            f"{name:32} {number:7} {(after.seconds - before.seconds) / number * 1e6:5.0f} us "
            f"{(after.bytes - before.bytes) / number / 1024:5.1f} KB "
            f"{(after.kernel - before.kernel) / number / 1024:5.1f} KB "
            f"{(after.descriptors - before.descriptors) / number:5.1f}",
            flush=True,
        )


def main() -> int:
    """Run everything, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.capacity", description=__doc__)
    parser.add_argument("--contexts", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--listeners", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--streams", type=int, default=100_000, help="default: %(default)s")
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    possible = hard - _DESCRIPTORS_LEFT
    if arguments.listeners + 2 * arguments.contexts > possible:
        parser.error(f"--listeners and twice --contexts: expected at most {possible} (ulimit -n)")
    with PrivateFabric(log_level="error") as fabric:
        _measure(fabric, arguments.contexts, arguments.listeners, arguments.streams, possible)
    _measure_processes()
    return 0


def _measure(
    fabric: PrivateFabric, contexts: int, listeners: int, streams: int, possible: int
) -> None:
    table = Table(fabric.pid)
    guest = fabric.guest(limits=_LIMITS)
    with contextlib.ExitStack() as stack:
        servers = [vsockets.create_server((2, _FIRST_PORT - 1), context=fabric.host)]
        stack.enter_context(servers[0])

        def connect(number: int = 2000) -> None:
            for _ in range(number):
                with vsockets.create_connection((2, _FIRST_PORT - 1), context=guest):
                    servers[0].accept()[0].close()

        connect()
        with table.row("connect and close", 2000):
            connect()
        with table.row("context", contexts):
            for _ in range(contexts):
                fabric.guest()
        with table.row("listener", listeners):
            for number in range(listeners):
                address = 2, _FIRST_PORT + number
                stack.enter_context(vsockets.create_server(address, context=fabric.host))
        with table.row("stream", streams):
            each = possible - listeners  # the processes inherit the listeners
            for first in range(0, streams, each):
                _open(stack, fabric, guest, min(each, streams - first))
        assert fabric.control.status()["streams"] == streams
        with table.row("connect and close, with all that", 2000):
            connect()
        begin = processor_time(fabric.pid)
        time.sleep(_IDLE_SECONDS)
        idle = (processor_time(fabric.pid) - begin) / _IDLE_SECONDS
        print(f"vsockd, nothing to do: {idle:.2%} of a processor; {_megabytes(fabric.pid)}")
        for name, call in (
            ("vsock status", fabric.control.status),
            ("vsock ls", fabric.control.sockets),
        ):
            begin = time.perf_counter()
            call()
            print(f"request of {name}: {time.perf_counter() - begin:.2f} s")
        begin, cpu = time.perf_counter(), processor_time(fabric.pid)
        fabric.control.suspend(guest.cid)
        wait_until(lambda: fabric.control.status()["streams"] == 0, "the streams to end", 60)
        print(
            f"all streams of the guest end: {time.perf_counter() - begin:.1f} s, "
            f"{(processor_time(fabric.pid) - cpu) / streams * 1e6:.0f} us of vsockd for each"
        )


def _open(
    stack: contextlib.ExitStack, fabric: PrivateFabric, guest: Attachment, number: int
) -> None:
    """Open streams between two new processes, which keep them until the end of ``stack``."""
    readers = []
    with vsockets.create_server((2, VMADDR_PORT_ANY), backlog=4096, context=fabric.host) as server:
        address = server.getsockname()

        def accept() -> object:
            return [server.accept()[0] for _ in range(number)]

        def connect() -> object:
            return [vsockets.create_connection(address, context=guest) for _ in range(number)]

        for work in (accept, connect):
            reader, writer = os.pipe()
            stack.enter_context(child(partial(_keep, work, writer)))
            os.close(writer)
            readers.append(reader)
    for reader in readers:
        if os.read(reader, 1) != b"r":
            raise RuntimeError("a process that opens streams failed")
        os.close(reader)


def _keep(work: Callable[[], object], writer: int) -> None:
    kept = work()
    os.write(writer, b"r")
    time.sleep(10_000)
    del kept


def _megabytes(pid: int) -> str:
    return f"{memory(pid) / 1e6:.0f} MB"


def _measure_processes() -> None:
    """Print the memory of a device and of a supervisor that wait."""
    vsock = [sys.executable, "-m", "vsockets.cli"]
    with PrivateFabric(log_level="error") as fabric:
        guest = fabric.guest()
        environment = fabric.environment(fabric.host)
        for name, command in (
            ("vsock device virtio", ["device", "virtio", "--socket", f"{fabric.folder}/v.sock"]),
            ("vsock device vmci", ["device", "vmci", "--socket", f"{fabric.folder}/m.sock"]),
            ("vsock run", ["run", "--cid", str(guest.cid), "--", "sleep", "1000"]),
        ):
            process = subprocess.Popen(
                [*vsock, *command],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                time.sleep(2)
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended with status {process.returncode}")
                size = sum(memory(pid) for pid in _family(process.pid))
                print(f"{name}: {size / 1e6:.0f} MB of its own")
            finally:
                process.terminate()
                process.wait()


def _family(pid: int) -> Iterator[int]:
    """Yield a process and its descendants, without the program that ``vsock run`` runs."""
    if Path(f"/proc/{pid}/comm").read_text() != "sleep\n":
        yield pid
        for child_pid in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from _family(int(child_pid))


if __name__ == "__main__":
    sys.exit(main())
