"""The life cycle of a virtual machine, and its effects on the VMCI device and its streams."""

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
    """Return whether the guest can create a stream and transfer data."""
    server, port = serve(machine)
    with server:
        job = machine.start("result = echo(connect(port))", port=port)
        with server.accept()[0] as sock:
            sock.settimeout(PATIENCE)
            return exchange(sock, 100_000) and job.result() == 100_000


def has_ended(sock: Any) -> bool:
    """Drain a stream; return True once it has ended."""
    try:
        while sock.recv(MIB):
            pass
    except ConnectionResetError:
        pass
    return True


def restart(machine: Machine, restart_guest: Callable[[], object]) -> None:
    """Restart the guest during a stream with full buffers in both directions."""
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
                while True:  # into memory that the next kernel will use
                    sock.send(bytes(MIB))
            except BlockingIOError:
                pass
            sock.settimeout(PATIENCE)
            restart_guest()
            assert has_ended(sock)
    machine.wait_for_boot()
    machine.run(COMMON)
    assert works(machine)


@pytest.mark.parametrize("machine", ["newest"], indirect=True)
def test_warm_reboot(machine: Machine) -> None:
    restart(machine, lambda: machine.start("os.system('reboot -f')"))


@pytest.mark.parametrize("machine", ["stable"], indirect=True)
def test_kexec_of_another_kernel(machine: Machine, tmp_path: Path) -> None:
    """The device is not told, except that it may no longer access memory."""
    program, source = tmp_path / "kexec", Path(__file__).with_name("kexec.c")
    compile_c("-static", "-o", program, source)
    paths = dict(zip(("/kexec", "/kernel", "/initrd"), (program, *machine.boots), strict=True))
    machine.put({name: path.read_bytes() for name, path in paths.items()})
    command = ["/kexec", "/kernel", "/initrd", COMMAND_LINE]
    run = "import subprocess; subprocess.run(command, check=True)"
    restart(machine, lambda: machine.start(run, command=command))


class TestMonitor:
    def test_streams_survive_stop_and_cont(self, machine: Machine) -> None:
        """QEMU does not tell the device: streams wait and continue."""
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

    def test_suspended_context_ends_streams(
        self, machine: Machine, fabric_of_machines: PrivateFabric
    ) -> None:
        """The administrator suspends the context as well: its streams end on both sides."""
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
                assert has_ended(accepted) and has_ended(dialled)
                with pytest.raises(OSError) as refused:
                    vsockets.create_connection((machine.cid, 6101), context=machine.host)
                assert refused.value.errno == errno.EHOSTUNREACH
                control.resume(machine.cid)
                machine.monitor("cont")
                assert [job.result() for job in jobs] == [b"", b""]
        assert works(machine)


def test_memory_above_four_gib(stage: Stage, fabric_of_machines: PrivateFabric) -> None:
    """Memory is in two parts around the devices; Linux allocates the upper one first."""
    with stage.machine(fabric_of_machines, "stable", memory=5120) as machine:
        machine.run(COMMON)
        assert "10000000" in machine.run("result = open('/proc/iomem').read()")
        assert works(machine)
        job = machine.start("result = echo(listener(6000).accept()[0])")
        with dial(machine, 6000) as sock:
            assert exchange(sock, 16 * MIB)
        assert job.result() == 16 * MIB


@as_root
def test_restricted_machine(stage: Stage) -> None:
    """The machine reaches services of the hypervisor and trusted endpoints only."""
    with PrivateFabric() as fabric:
        fabric.control.add_context(40, profile="restricted")
        with stage.machine(fabric, "stable", cid=40) as machine:
            machine.run(COMMON)
            assert works(machine)  # with CAP_NET_ADMIN, this process is trusted
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


def test_killed_device_ends_streams_and_can_be_replaced(
    stage: Stage, fabric_of_machines: PrivateFabric
) -> None:
    """The host's programs see the end of their streams.

    The guest runs until it accesses the device; then that processor blocks.  A new machine with a
    new device works.
    """
    with stage.machine(fabric_of_machines, "stable", arguments=("-smp", "2")) as machine:
        machine.run(COMMON)
        server, port = serve(machine)
        with server:
            machine.start(_WAIT, port=port)
            with server.accept()[0] as sock:
                sock.settimeout(PATIENCE)
                assert sock.recv(1) == b"x"
                with datagram(machine) as receiver:
                    # Afterwards, QEMU does not wait for a reply; otherwise it would exit.
                    machine.run("dgram().sendto(b'y', (2, port))", port=receiver.getsockname()[1])
                machine.kill_device()
                assert has_ended(sock)
        assert machine.run("result = sum(range(1000))") == 499_500
        machine.kill_qemu()
        machine.start_device()
        machine.boot()
        machine.run(COMMON)
        assert works(machine)
