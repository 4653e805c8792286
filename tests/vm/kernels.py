"""``make test-kernels``: what works with each kernel of Debian as a guest, over each device.

``python -m vm.kernels`` boots a machine for each kernel and device, one after the other, and writes
the results to docs/internals/kernels.md.  ``--only trixie/vmci`` repeats one machine (and may be
given several times); the results of the others are kept below ``~/.cache/vsockets``.
``--missing`` runs only the checks that have failed or were not run.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from c_compiler import compile_c
from cli.vsock import Vsock
from conformance.kernel_suite import Unavailable as SuiteUnavailable
from conformance.kernel_suite import free_port, vsock_test
from vsockets.testing import PrivateFabric, wait_until
from vsockets.vm import apt
from vsockets.vm.guest_image import COMMAND_LINE

from . import downloads
from .conftest import COMMON, NETWORK_UP, Stage, network_card
from .exchanges import MIB, PATIENCE, datagram, dial, echo_one_stream, exchange, serve
from .image import LOOPBACK, NETWORK
from .machine import Job, Machine
from .test_conformance import CONTROL, Peers
from .test_machine_life_cycle import has_ended, restart, works
from .test_unread import MESSAGES, Sender
from .test_virtio import TestSequencedPackets

#: The kernels by their names in downloads.kernel(), and their suites.
KERNELS = {
    "stable": "Debian 12",
    "trixie": "Debian 13",
    "testing": "testing",
    "newest": "backports for 13",
}
DEVICES = ("vmci", "virtio")

PAGE = Path(__file__).parents[2] / "docs/internals/kernels.md"
#: Results by machine: they outlive a run that repeats some machines only.
RESULTS = apt.CACHE.parent / "kernels.json"

#: Names of feature bits.
_VIRTIO = {1: "seqpacket", 28: "indirect", 29: "event index", 34: "packed"}
_VMCI = {4: "datagrams", 8: "notifications", 16: "64-bit pages", 32: "datagrams by DMA"}

#: Reasons for what does not pass, which is then no failure, by check, device and kernel's name.
REASONS = {
    ("vsock_test, guest is client", "vmci", "stable"): "16 and 17 expect a signal (SIGPIPE) of "
    "the guest's kernel, which came with Linux 6.7 (inferred)",
    ("S3", "virtio", "stable"): "this kernel stalls streams after its second sleep, and the first "
    "one was for s2idle (see virtio.md, Limitations)",
    ("vsock_test, guest is client", "virtio", "stable"): "the guest's kernel lacks what 11 to 13 "
    "and 18, 19, 27 and 37 test (its own errors, MSG_ZEROCOPY); 16 and 17 expect a signal "
    "(SIGPIPE), which came with Linux 6.7 (inferred from their messages)",
}


class NotApplicable(Exception):
    """The kernel or the device has no such thing; the text gives the reason."""


class Guest:
    """A running machine, with what its checks need."""

    def __init__(self, machine: Machine, vsock: Vsock, port: int, folder: Path) -> None:
        self.machine = machine
        self.vsock = vsock
        self.port = port
        self.folder = folder
        self._ports = itertools.count(6200)

    def new_port(self) -> int:
        """Return a port that no earlier check has used."""
        return next(self._ports)

    def prepare(self) -> None:
        """Define the common functions of the guest's programs."""
        self.machine.run(COMMON)


def _features(guest: Guest) -> str:
    machine = guest.machine
    if machine.kind == "vmci":
        log = machine.run("result = os.popen('dmesg').read()")
        found = re.search(r"[Uu]sing capabilities 0x([0-9a-f]+)", log)
        if found is None:
            raise AssertionError("the driver has not logged its capabilities")
        bits = int(found[1], 16)
        return ", ".join(name for bit, name in _VMCI.items() if bits & bit)
    return _virtio_features(machine)


def _virtio_features(machine: Machine) -> str:
    bits = machine.run(
        """
        drivers = '/sys/bus/virtio/drivers/vmw_vsock_virtio_transport'
        (name,) = [name for name in os.listdir(drivers) if name.startswith('virtio')]
        result = open(f'{drivers}/{name}/features').read()
        """
    )
    return ", ".join(name for bit, name in _VIRTIO.items() if bits[bit] == "1")


def _streams(guest: Guest) -> None:
    machine = guest.machine
    assert works(machine)
    port = guest.new_port()
    job = echo_one_stream(machine, port)
    with dial(machine, port) as sock:
        assert exchange(sock, 4 * MIB)
    assert job.result() == 4 * MIB


def _packets(guest: Guest) -> None:
    if guest.machine.kind == "vmci":
        raise NotApplicable("VMCI has no sequenced packets")
    test = TestSequencedPackets()
    test.test_messages_in_both_directions(guest.machine)
    test.test_host_connects(guest.machine)


def _datagrams(guest: Guest) -> None:
    machine = guest.machine
    if machine.kind == "virtio":
        raise NotApplicable("virtio-vsock has no datagrams")
    sizes = [1, 4071, 20_000, 65_000]
    with datagram(machine) as sock:
        job = machine.start(
            """
            s = dgram(); result = []
            for n in sizes:
                s.sendto(os.urandom(n), (2, port))
                data, source = s.recvfrom(1 << 20)
                result.append(len(data))
                s.sendto(data, (2, port))
            """,
            sizes=sizes,
            port=sock.getsockname()[1],
        )
        for size in sizes:
            data, source = sock.recvfrom(MIB)
            assert (len(data), source[0]) == (size, machine.cid)
            sock.sendto(data[::-1], source)
            assert sock.recv(MIB) == data[::-1]
        assert job.result() == sizes


def _unread(guest: Guest) -> None:
    machine = guest.machine
    port = guest.new_port()
    machine.run("import sys; sys.unread = listener(port)", port=port)
    accepted = machine.start("import sys; sys.taken, _ = sys.unread.accept()\nresult = True")
    sender = Sender(machine, socket.SOCK_STREAM, port, 8, MESSAGES)
    try:
        assert accepted.result()
        assert sender.stalled.wait(PATIENCE)
        total = machine.run(
            """
            import sys
            result = 0
            while d := sys.taken.recv(1 << 17): result += len(d)
            sys.taken.close(); sys.unread.close()
            """
        )
    finally:
        sender.close()
    assert total == 8 * MESSAGES


def _vsock_test(client: str) -> Callable[[Guest], str]:
    def check(guest: Guest) -> str:
        try:
            program = vsock_test()
        except SuiteUnavailable as reason:
            raise NotApplicable(f"not available here: {reason}") from None
        peers = Peers(guest.machine, guest.vsock, program, guest.port)
        column = ("guest", "host").index(client)
        left = [case for case in peers.cases if case.results[column] == "pass"]
        count, failed = len(left), []
        again = False  # a case that fails, by a timeout on a busy machine, has a second try
        while left:
            output, succeeded = peers.run(client, left)
            if succeeded:
                break
            passed = {int(number) for number in re.findall(r"^(\d+) - .*\.\.\.ok$", output, re.M)}
            if passed:
                again = False
            left = [case for case in left if case.id not in passed]
            print(f"vsock_test: {output[-600:]}", flush=True)
            if left and again:
                failed.append(left.pop(0).id)
            again = not again
        if failed:
            return f"{count - len(failed)} of {count}, not {', '.join(map(str, failed))}"
        return f"all {count}"

    return check


def _pause(guest: Guest) -> None:
    machine = guest.machine
    server, port = serve(machine)
    with server:
        job = machine.start("result = echo(connect(port))", port=port)
        with server.accept()[0] as sock:
            sock.settimeout(PATIENCE)
            machine.monitor("stop")
            sock.sendall(bytes(1000))
            machine.monitor("cont")
            with sock.makefile("rb") as file:
                assert file.read(1000) == bytes(1000)
            assert exchange(sock, MIB)
        assert job.result() == MIB + 1000


def _reload(guest: Guest) -> None:
    modules = {
        "vmci": ("vmw_vmci", "vmw_vsock_vmci_transport"),
        "virtio": ("vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport"),
    }
    guest.machine.run(
        """
        import sys
        # Objects whose descriptors are closed below would later close those of new sockets.
        for name in ('listening', 'unread', 'taken'): sys.__dict__.pop(name, None)
        for fd in os.listdir('/proc/self/fd'):  # sockets that earlier checks have left open
            try:
                if os.readlink('/proc/self/fd/' + fd).startswith('socket:'): os.close(int(fd))
            except OSError: pass
        assert not os.system('rmmod vsock_loopback')  # it uses the drivers' common part
        loaded = [n for n in names if os.path.exists(f'/modules/{n}.ko')]
        for time_ in range(3):
            for n in reversed(loaded):  # the kernel drops a socket's last reference a second late
                deadline = time.monotonic() + 60
                while os.system('rmmod ' + n):
                    assert time.monotonic() < deadline, open('/proc/modules').read()
                    time.sleep(0.1)
            for n in loaded: assert not os.system(f'insmod /modules/{n}.ko')
        if os.path.exists(f'/modules/{common}.ko') and not os.path.exists(f'/sys/module/{common}'):
            assert not os.system(f'insmod /modules/{common}.ko')
        assert not os.system('insmod /modules/vsock_loopback.ko')
        """,
        timeout=240,
        names=modules[guest.machine.kind],
        common=LOOPBACK[0],
    )
    wait_until(lambda: works(guest.machine), "the device", PATIENCE)


def _sleep(guest: Guest, program: str, wake: Callable[[Machine, Job], None]) -> None:
    """Have the guest sleep during two streams: both end on both sides, and new ones work."""
    machine, listening = guest.machine, guest.new_port()
    server, port = serve(machine)
    wait = "s.sendall(b'x')\ntry: result = s.recv(1)\nexcept OSError: result = b''"
    with server:
        jobs = [
            machine.start(f"s = connect(port); {wait}", port=port),
            machine.start(f"s, _ = listener(port).accept(); {wait}", port=listening),
        ]
        with server.accept()[0] as accepted, dial(machine, listening) as dialled:
            assert accepted.recv(1) == dialled.recv(1) == b"x"
            wake(machine, machine.start(program))
            assert has_ended(accepted) and has_ended(dialled)
        assert [job.result() for job in jobs] == [b"", b""]
    _streams(guest)


def _s2idle(guest: Guest) -> None:
    entry = "suspend entry (s2idle)"

    def wake(machine: Machine, sleeper: Job) -> None:
        """Wake the guest by bytes for its serial port, once its console says that it sleeps."""
        wait_until(lambda: entry in machine.console, "the guest to sleep", PATIENCE)

        def wakes() -> bool:
            machine.nudge()
            with contextlib.suppress(TimeoutError):
                sleeper.result(0.5)
                return True
            return False

        wait_until(wakes, "the guest to wake up", PATIENCE)

    _sleep(
        guest,
        """
        with open('/sys/class/tty/ttyS1/power/wakeup', 'w') as f: f.write('enabled')
        with open('/proc/sys/kernel/printk', 'w') as f: f.write('7')
        with open('/sys/power/state', 'w') as f: f.write('freeze')
        """,
        wake,
    )


def _to_memory(guest: Guest) -> None:
    def wake(machine: Machine, sleeper: Job) -> None:
        def sleeps() -> bool:
            return bool(machine.monitor("query-status")["status"] == "suspended")

        wait_until(sleeps, "the guest to sleep", PATIENCE)
        machine.monitor("system_wakeup")
        sleeper.result()

    _sleep(
        guest,
        """
        with open('/sys/power/mem_sleep', 'w') as f: f.write('deep')
        with open('/sys/power/state', 'w') as f: f.write('mem')
        """,
        wake,
    )


def _reboot(guest: Guest) -> None:
    restart(guest.machine, lambda: guest.machine.start("os.system('reboot -f')"))
    _streams(guest)


def _kexec(guest: Guest) -> None:
    machine = guest.machine
    program = guest.folder / "kexec"
    compile_c("-static", "-o", program, Path(__file__).with_name("kexec.c"))
    paths = dict(zip(("/kexec", "/kernel", "/initrd"), (program, *machine.boots), strict=True))
    machine.put({name: path.read_bytes() for name, path in paths.items()})
    command = ["/kexec", "/kernel", "/initrd", COMMAND_LINE]
    run = "import subprocess; subprocess.run(command, check=True)"
    restart(machine, lambda: machine.start(run, command=command))
    _streams(guest)


def _power_cut(guest: Guest) -> str | None:
    """Kill QEMU during a stream, and boot again, over virtio with packed rings."""
    machine = guest.machine
    server, port = serve(machine)
    with server:
        machine.start("s = connect(port)\nwhile True: s.sendall(bytes(65536))", port=port)
        with server.accept()[0] as sock:
            sock.settimeout(PATIENCE)
            sock.recv(MIB)
            machine.packed = machine.kind == "virtio"
            machine.kill_qemu()
            assert has_ended(sock)
    machine.boot()
    guest.prepare()
    _streams(guest)
    if machine.packed:
        _packets(guest)
        _unread(guest)
        assert "packed" in _virtio_features(machine)
        return "packed rings"
    return None


#: The checks in their order, which saves boots.
CHECKS: dict[str, Callable[[Guest], str | None]] = {
    "features": _features,
    "streams": _streams,
    "sequenced packets": _packets,
    "datagrams": _datagrams,
    f"{MESSAGES} unread packets": _unread,
    "pause and resume": _pause,
    "reload of the driver": _reload,
    "vsock_test, guest is client": _vsock_test("guest"),
    "vsock_test, host is client": _vsock_test("host"),
    "s2idle": _s2idle,
    "S3": _to_memory,
    "reboot": _reboot,
    "kexec": _kexec,
    "QEMU killed, and started again": _power_cut,
}


class Result(NamedTuple):
    """The outcome of a check: the cell of the table, and a reason for the list below it."""

    cell: str
    reason: str = ""


def perform(guest: Guest, check: Callable[[Guest], str | None]) -> Result:
    """Return the result of a check."""
    try:
        return Result(check(guest) or "pass")
    except NotApplicable as error:
        return Result("n/a", str(error))
    except Exception as error:
        text = (str(error).strip() or type(error).__name__).splitlines()
        return Result("fail", f"{text[0][:200]} … {text[-1][:200]}" if text[1:] else text[0][:200])


@contextlib.contextmanager
def guest_of(stage: Stage, kernel: str, device: str, folder: Path) -> Iterator[Guest]:
    """Boot a machine of a fabric of its own."""
    port = free_port()
    with PrivateFabric() as fabric, Vsock(fabric.folder) as vsock:
        card = network_card(port, CONTROL)
        with stage.machine(fabric, kernel, device=device, arguments=card) as machine:
            guest = Guest(machine, vsock, port, folder)
            guest.prepare()
            machine.run(NETWORK_UP, modules=[*NETWORK, *LOOPBACK])
            yield guest


def run(stage: Stage, kernel: str, device: str, folder: Path, checks: list[str]) -> dict[str, Any]:
    """Run checks with a machine; a failed one is followed by a new machine."""
    began = time.monotonic()
    left = [(name, CHECKS[name]) for name in checks]
    results: dict[str, Any] = {}
    while left:
        try:
            with guest_of(stage, kernel, device, folder) as guest:
                version = guest.machine.run("result = os.uname().release")
                results["kernel"] = version
                while left:
                    name, check = left.pop(0)
                    started = time.monotonic()
                    result = results[name] = perform(guest, check)
                    seconds = time.monotonic() - started
                    print(f"{version} {device}: {name}: {result} ({seconds:.0f} s)", flush=True)
                    if result.cell == "fail":
                        print(f"device: {guest.machine.device_log[-1500:]}", flush=True)
                        print(f"console: {guest.machine.console[-1500:]}", flush=True)
                        break
        except (AssertionError, TimeoutError) as error:  # it does not boot
            name, _ = left.pop(0)
            results[name] = Result("fail", f"no machine: {str(error).splitlines()[0][:80]}")
    results["seconds"] = round(time.monotonic() - began)
    return results


_HEAD = """\
# Guests' kernels by device

`make test-kernels` boots a machine for each of Debian's kernels and each device, one after the
other, in emulation (QEMU {qemu}, `-accel tcg`), and writes this page. All of it took {minutes}
minutes, on two cores with other work. `PYTHONPATH=tests .venv/bin/python -m vm.kernels --only
trixie/vmci` repeats one machine, and with `--missing` only what has failed there.

- **features**: the driver has the device; the features in use.
- **streams**, **sequenced packets**, **datagrams**: both sides connect or send, and get back what
  they have sent.
- **{unread} unread packets**: the guest's program reads none of {unread} small writes until all
  are sent, and then gets them all.
- **pause and resume**: a stream goes on after `stop` and `cont` of QEMU's monitor, with what was
  sent meanwhile.
- **reload of the driver**: three times; new streams work.
- **vsock_test**: the Linux kernel's own test; of its cases, those that pass with the newest kernel
  ([conformance.md](conformance.md)).
- **s2idle**, **S3**: the guest sleeps, and bytes for its serial port or `system_wakeup` wake it:
  streams end on both sides, new ones work.
- **reboot**, **kexec**: the guest restarts with full buffers of a stream, which ends for the host;
  new ones work. kexec starts the same kernel without the firmware.
- **QEMU killed, and started again**: the stream ends for the host; the next QEMU uses the same
  device, over virtio with packed rings.

n/a: not applicable.

"""


def page(results: dict[str, dict[str, Any]]) -> str:
    """Return the page for all results."""
    total = sum(machine["seconds"] for machine in results.values())
    qemu = re.search(r"version ([\d.]+)", apt.run(downloads.qemu(), "--version"))
    head = _HEAD.format(qemu=qemu[1] if qemu else "?", minutes=round(total / 60), unread=MESSAGES)
    return head + "\n".join(_table(device, results) for device in DEVICES)


def _reason(check: str, machine: str) -> str:
    """Return the known reason why a check does not pass with a machine, or an empty string."""
    kernel, _, device = machine.partition("/")
    return REASONS.get((check, device, kernel), "")


def _table(device: str, results: dict[str, dict[str, Any]]) -> str:
    machines = {name: results.get(f"{name}/{device}", {}) for name in KERNELS}
    versions = {
        name: re.split("[+]|-cloud", found.get("kernel", "not run"))[0]
        for name, found in machines.items()
    }
    lines = [f"## {'VMCI' if device == 'vmci' else 'virtio'}\n"]
    heads = [f"{versions[name]}, {suite}" for name, suite in KERNELS.items()]
    lines += [f"| | {' | '.join(heads)} |", f"|---{'|---' * len(heads)}|"]
    notes: dict[str, list[str]] = {}
    for check in CHECKS:
        cells = []
        for name, found in machines.items():
            cell, reason = found.get(check, ("not run", ""))
            reason = _reason(check, f"{name}/{device}") or reason
            cells.append(cell)
            if reason and cell != "pass":
                notes.setdefault(f"{check}: {reason}", []).append(versions[name])
        lines.append(f"| {check} | {' | '.join(cells)} |")
    seconds = [str(found.get("seconds", "")) for found in machines.values()]
    lines.append(f"| seconds | {' | '.join(seconds)} |")
    for note, kernels in notes.items():
        where = "" if len(kernels) == len(machines) else f" ({', '.join(kernels)})"
        lines += [] if lines[-1].startswith("- ") else [""]
        lines.append(f"- {note}{where}")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Return the exit status: 0 if no check fails."""
    every = [f"{kernel}/{device}" for kernel in KERNELS for device in DEVICES]
    parser = argparse.ArgumentParser(description="Run guests' kernels over each device.")
    parser.add_argument("--only", action="append", choices=every, help="a machine; repeatable")
    parser.add_argument(
        "--missing", action="store_true", help="run the checks that have failed or were not run"
    )
    parser.add_argument("--page", action="store_true", help="write the page from earlier results")
    chosen = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text())
    os.environ["VSOCKETS_REQUIRE_VM"] = "1"  # a missing download is an error, not a skip
    with tempfile.TemporaryDirectory(prefix="kernels-", dir="/tmp") as folder:
        stage = Stage(Path(folder))
        for name in [] if chosen.page else chosen.only or every:
            kernel, _, device = name.partition("/")
            known = results.get(name, {}) if chosen.missing else {}
            checks = [one for one in CHECKS if known.get(one, ("fail",))[0] == "fail"]
            found = run(stage, kernel, device, Path(folder), checks)
            found["seconds"] += known.get("seconds", 0)
            results[name] = {**known, **found}
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1))
    PAGE.write_text(page(results))
    failed = [
        f"{name}: {check}: {found[check][1]}"
        for name, found in results.items()
        for check in CHECKS
        if check in found and found[check][0] == "fail" and not _reason(check, name)
    ]
    print("\n".join(failed) or "kernels: no check failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
