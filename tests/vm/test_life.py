"""What becomes of a virtual machine, and of its VMCI device and its streams with it."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vsockets
from c_compiler import compile_c
from daemon.users import NOBODY, as_root
from vsockets.testing import PrivateFabric
from vsockets.vm.guest_image import COMMAND_LINE

from .conftest import COMMON, Stage
from .exchanges import MIB, PATIENCE, datagram, dial, exchange, serve
from .machine import GuestError, Machine

_WAIT = "s = connect(port); s.sendall(b'x'); result = s.recv(1)"


def works(machine: Machine) -> bool:
    """Whether a stream of the guest comes about and carries bytes."""
    server, port = serve(machine)
    with server:
        job = machine.start("result = echo(connect(port))", port=port)
        with server.accept()[0] as sock:
            sock.settimeout(PATIENCE)
            return exchange(sock, 100_000) and job.result() == 100_000


def ends(sock: Any) -> bool:
    """Whether a stream has ended, after what was on its way."""
    try:
        while sock.recv(MIB):
            pass
    except ConnectionResetError:
        pass
    return True


def restart(machine: Machine, begin: Callable[[], object]) -> None:
    """The guest starts anew while a stream of it is full both ways."""
    server, port = serve(machine)
    with server:
        flood = "s = connect(port)\nwhile True: s.sendall(bytes(65536))"
        machine.start(flood, port=port)
        sock, _ = server.accept()
        with sock:
            sock.settimeout(PATIENCE)
            sock.recv(MIB)
            sock.setblocking(False)
            try:
                while True:  # into memory that will be another kernel's
                    sock.send(bytes(MIB))
            except BlockingIOError:
                pass
            sock.settimeout(PATIENCE)
            begin()
            assert ends(sock)
    machine.wait_for_boot()
    machine.run(COMMON)
    assert works(machine)


def test_a_warm_reboot(machine: Machine) -> None:
    restart(machine, lambda: machine.start("os.system('reboot -f')"))


def test_another_kernel_by_kexec(
    stage: Stage, fabric_of_machines: PrivateFabric, tmp_path: Path
) -> None:
    """The device hears nothing of it but that it must not access memory any more."""
    with stage.machine(fabric_of_machines, "stable") as machine:
        machine.run(COMMON)
        program, source = tmp_path / "kexec", Path(__file__).with_name("kexec.c")
        compile_c("-static", "-o", program, source)
        paths = dict(zip(("/kexec", "/kernel", "/initrd"), (program, *machine.boots), strict=True))
        machine.put({name: path.read_bytes() for name, path in paths.items()})
        command = ["/kexec", "/kernel", "/initrd", COMMAND_LINE]
        run = "import subprocess; subprocess.run(command, check=True)"
        restart(machine, lambda: machine.start(run, command=command))


class TestMonitor:
    def test_stopped_and_continued(self, machine: Machine) -> None:
        """QEMU tells a device nothing of it: streams wait, and go on."""
        server, port = serve(machine)
        with server:
            job = machine.start("result = echo(connect(port))", port=port)
            with server.accept()[0] as sock:
                sock.settimeout(PATIENCE)
                machine.monitor("stop")
                sock.sendall(bytes(1000))
                with pytest.raises(TimeoutError):
                    vsockets.create_connection((machine.cid, 6100), context=machine.host)
                machine.monitor("cont")
                sock.shutdown(socket.SHUT_WR)
                received = b"".join(iter(lambda: sock.recv(MIB), b""))
                assert received == bytes(1000)
            assert job.result() == 1000
        assert works(machine)

    def test_suspended(self, machine: Machine, fabric_of_machines: PrivateFabric) -> None:
        """Who stops a machine says so to the fabric, and its streams end on both sides."""
        control = fabric_of_machines.control
        server, port = serve(machine)
        with server:
            jobs = [
                machine.start(_WAIT, port=port),
                machine.start("s, _ = listener(6101).accept(); s.send(b'x'); result = s.recv(1)"),
            ]
            with server.accept()[0] as accepted, dial(machine, 6101) as dialled:
                assert accepted.recv(1) == dialled.recv(1) == b"x"
                machine.monitor("stop")
                control.suspend(machine.cid)
                assert ends(accepted) and ends(dialled)
                with pytest.raises(OSError) as refused:
                    vsockets.create_connection((machine.cid, 6101), context=machine.host)
                assert refused.value.errno == errno.EHOSTUNREACH
                control.resume(machine.cid)
                machine.monitor("cont")
                assert [job.result() for job in jobs] == [b"", b""]
        assert works(machine)


def test_more_memory_than_below_four_gib(stage: Stage, fabric_of_machines: PrivateFabric) -> None:
    """It lies in two parts, around the devices; Linux gives out the upper one first."""
    with stage.machine(fabric_of_machines, "stable", memory=5120) as machine:
        machine.run(COMMON)
        assert "10000000" in machine.run("result = open('/proc/iomem').read()")
        assert works(machine)
        job = machine.start("result = echo(listener(6000).accept()[0])")
        with dial(machine, 6000) as sock:
            assert exchange(sock, 16 * MIB)
        assert job.result() == 16 * MIB


@as_root
def test_a_restricted_machine(stage: Stage) -> None:
    """It reaches services of the hypervisor, and endpoints that are trusted."""
    with PrivateFabric() as fabric:
        fabric.control.add_context(40, profile="restricted")
        with stage.machine(fabric, "stable", cid=40) as machine:
            machine.run(COMMON)
            assert works(machine)  # with CAP_NET_ADMIN this process is trusted
            with vsockets.create_server((0, 9760), context=fabric.hypervisor) as server:
                job = machine.start("result = echo(connect(9760, 0))")
                with server.accept()[0] as sock:
                    assert exchange(sock, 1000)
                assert job.result() == 1000
            fabric.folder.parent.chmod(0o755)
            os.seteuid(NOBODY)
            try:
                server, port = serve(machine)
                datagrams = vsockets.socket(type=socket.SOCK_DGRAM, context=machine.host)
                datagrams.bind((2, port))
            finally:
                os.seteuid(0)
            with server, datagrams:
                for attempt, code in [
                    ("connect(port)", errno.ECONNRESET),
                    ("dgram().sendto(b'x', (2, port))", errno.EHOSTUNREACH),
                ]:
                    with pytest.raises(GuestError) as refused:
                        machine.run(attempt, port=port)
                    assert refused.value.errno == code


def test_the_device_is_killed(stage: Stage, fabric_of_machines: PrivateFabric) -> None:
    """The host's programs see the end.  The guest lives until it has something to say to the
    device; then that processor stands still.  A new machine with a new device is as any.
    """
    with stage.machine(fabric_of_machines, "stable", arguments=("-smp", "2")) as machine:
        machine.run(COMMON)
        server, port = serve(machine)
        with server:
            machine.start(_WAIT, port=port)
            with server.accept()[0] as sock:
                sock.settimeout(PATIENCE)
                assert sock.recv(1) == b"x"
                with datagram(machine) as heard:
                    # When this has returned QEMU waits for no answer.  Else it ends itself.
                    machine.run("dgram().sendto(b'y', (2, port))", port=heard.getsockname()[1])
                machine.kill_device()
                assert ends(sock)
        assert machine.run("result = sum(range(1000))") == 499_500
        machine.kill_qemu()
        machine.start_device()
        machine.boot()
        machine.run(COMMON)
        assert works(machine)
