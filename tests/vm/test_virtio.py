"""AF_VSOCK programs of a stock guest with the host's programs, over the virtio device.

The tests of streams are those of the VMCI device: programs cannot tell the devices apart.
"""

from __future__ import annotations

import errno
import socket

import pytest

import vsockets
from vsockets import AF_VSOCK
from vsockets.testing import PrivateFabric, wait_until

from . import test_vmci, test_vmci_streams
from .conftest import COMMON, Machines, Stage, unload
from .exchanges import MIB, PATIENCE, dial, exchange, has_virtio_device, serve
from .machine import GuestError, Machine


@pytest.fixture(scope="module", params=["stable", "newest"])
def machine(request: pytest.FixtureRequest, machines: Machines) -> Machine:
    """A running guest for each kernel."""
    return machines.get(request.param, "virtio")


def test_stock_driver_is_bound(machine: Machine) -> None:
    assert has_virtio_device(machine)
    command = "import fcntl\nwith open('/dev/vsock') as f: b = fcntl.ioctl(f, 0x7b9, bytes(4))\n"
    assert machine.run(command + "result = struct.unpack('I', b)[0]") == machine.cid


class TestStreams(test_vmci_streams.TestStreams):
    @pytest.mark.parametrize("size", [1024, 5000, 1 << 20])
    def test_buffer_sizes(self, machine: Machine, size: int) -> None:
        """The guest's receive buffer, which Linux 7.3 also applies to sending.

        With less than about 600 bytes, 7.3 accepts no packet at all: it counts its own overhead.
        """
        server, port = serve(machine)
        with server:
            job = machine.start(
                "s = stream(); sizes(s, size); s.connect((2, port)); result = echo(s)",
                size=size,
                port=port,
            )
            sock, _ = server.accept()
            total = min(30 * size, 4 * MIB)
            with sock:
                assert exchange(sock, total)
            assert job.result() == total

    def test_connects_without_listener_are_refused(self, machine: Machine) -> None:
        for cid in (2, 999):
            with pytest.raises(GuestError) as failed:
                machine.run("connect(9, cid)", cid=cid)
            assert failed.value.errno == errno.ECONNRESET
        with pytest.raises(ConnectionResetError):
            vsockets.create_connection((machine.cid, 9), context=machine.host)

    def test_two_hundred_streams_at_once(self, machine: Machine) -> None:
        job = machine.start(
            """
            l = listener(6010)
            all = [l.accept()[0] for i in range(200)]
            for s in all: s.sendall(s.recv(10))
            result = [s.recv(10) for s in all]
            """
        )
        socks = [dial(machine, 6010)]
        while len(socks) < 200:
            socks.append(vsockets.create_connection((machine.cid, 6010), context=machine.host))
        for number, sock in enumerate(socks):
            sock.sendall(b"%d" % number)
        for number, sock in enumerate(socks):
            sock.settimeout(PATIENCE)
            assert sock.recv(10) == b"%d" % number
            sock.close()
        assert job.result() == [b""] * 200

    def test_many_connects_of_the_host(self, machine: Machine) -> None:
        machine.run("import sys; sys.listening = listener(6011)")
        job = machine.start(
            """
            import sys
            for i in range(count):
                s, _ = sys.listening.accept(); s.sendall(s.recv(10)); result = s.recv(10); s.close()
            """,
            count=test_vmci_streams.CONNECTS,
        )
        for number in range(test_vmci_streams.CONNECTS):
            with vsockets.create_connection((machine.cid, 6011), context=machine.host) as sock:
                sock.settimeout(PATIENCE)
                sock.sendall(b"%d" % number)
                assert sock.recv(10) == b"%d" % number
        assert job.result() == b""

    def test_large_writes(self, machine: Machine) -> None:
        """Debian's Rust back end 0.3.0 hangs on these writes of a 7.3 guest."""
        server, port = serve(machine)
        with server:
            for size in (4096, 36_864, 65_000, 65_536, 128 * 1024 + 1, MIB):
                machine.start(
                    "s = connect(port)\nfor i in range(20): s.sendall(bytes(size))\ns.close()",
                    port=port,
                    size=size,
                )
                with server.accept()[0] as sock:
                    count = 0
                    while data := sock.recv(MIB):
                        count += len(data)
                assert count == 20 * size


class TestSequencedPackets:
    def test_messages_in_both_directions(self, machine: Machine) -> None:
        sizes = [1, 100, 4096, 65_536, 65_537, 200_000]
        with vsockets.socket(AF_VSOCK, socket.SOCK_SEQPACKET, context=machine.host) as server:
            server.bind((2, vsockets.VMADDR_PORT_ANY))
            server.listen()
            server.settimeout(PATIENCE)
            job = machine.start(
                """
                s = socket.socket(AF, socket.SOCK_SEQPACKET); s.connect((2, port)); result = []
                for n in sizes:
                    s.send(bytes(n)); result.append(len(s.recv(1 << 20)))
                """,
                sizes=sizes,
                port=server.getsockname()[1],
            )
            sock, _ = server.accept()
            with sock:
                sock.settimeout(PATIENCE)
                for size in sizes:
                    assert len(sock.recv(MIB)) == size
                    sock.send(bytes(size))
                assert job.result() == sizes

    def test_host_connects(self, machine: Machine) -> None:
        job = machine.start(
            """
            l = socket.socket(AF, socket.SOCK_SEQPACKET); l.bind((ANY, 6020)); l.listen()
            s, _ = l.accept(); s.send(s.recv(100)); result = s.recv(100)
            """
        )
        found = []

        def connects() -> bool:
            sock = vsockets.socket(AF_VSOCK, socket.SOCK_SEQPACKET, context=machine.host)
            try:
                sock.connect((machine.cid, 6020))
            except ConnectionResetError:
                sock.close()
                return False
            found.append(sock)
            return True

        wait_until(connects, "the guest to listen", PATIENCE)
        with found[0] as sock:
            sock.settimeout(PATIENCE)
            sock.send(b"one")
            assert sock.recv(100) == b"one"
        assert job.result() == b""


def test_datagram_to_the_guest_is_refused(machine: Machine) -> None:
    """virtio-vsock has no datagrams."""
    with (
        vsockets.socket(AF_VSOCK, socket.SOCK_DGRAM, context=machine.host) as sock,
        pytest.raises(ConnectionRefusedError),
    ):
        sock.sendto(b"x", (machine.cid, 9))


def test_nfs_client_reports_missing_datagrams(machine: Machine) -> None:
    """Linux supports datagrams over VMCI only; its own error is "No such device"."""
    with pytest.raises(GuestError, match="only with the vmci device"):
        machine.run(
            """
            import asyncio
            from vsockets.nfs.rpc_client import RpcClient
            from vsockets.attachment import KernelContext as Kernel
            from vsockets.model.locator import Vsock
            async def connect(): RpcClient.connect(Vsock(2, 2049, datagram=True), Kernel())
            asyncio.run(connect())
            """
        )


def echoes(machine: Machine) -> bool:
    server, port = serve(machine)
    with server:
        job = machine.start("result = echo(connect(port))", port=port)
        with server.accept()[0] as sock:
            return exchange(sock, 1000) and job.result() == 1000


class TestLife(test_vmci.TestLife):
    def test_driver_is_reloaded(self, machine: Machine) -> None:
        names = [f"vmw_vsock_virtio_transport{end}" for end in ("_common", "")]
        for _ in range(5):
            unload(machine, *reversed(names))
            machine.run(
                "for n in names: assert not os.system(f'insmod /modules/{n}.ko')", names=names
            )
        assert echoes(machine)

    # To the device, a boot is one whatever boots: one kernel is enough for each kind of end.
    @pytest.mark.parametrize("machine", ["newest"], indirect=True)
    def test_guest_reboots(self, machine: Machine) -> None:
        server, port = serve(machine)
        with server:
            machine.start("s = connect(port); s.sendall(b'x'); time.sleep(99)", port=port)
            with server.accept()[0] as sock:
                assert sock.recv(1) == b"x"
                machine.monitor("system_reset")
                machine.wait_for_boot()
                machine.run(COMMON)
                assert sock.recv(1) == b""
        assert echoes(machine)

    @pytest.mark.parametrize("machine", ["stable"], indirect=True)
    def test_guest_panics(self, machine: Machine) -> None:
        server, port = serve(machine)
        with server:
            machine.start(
                """
                s = connect(port); s.sendall(b'x')
                open('/proc/sys/kernel/panic', 'w').write('-1')
                open('/proc/sysrq-trigger', 'w').write('c')
                """,
                port=port,
            )
            with server.accept()[0] as sock:
                assert sock.recv(1) == b"x"
                machine.wait_for_boot()
                machine.run(COMMON)
                assert sock.recv(1) == b""
        assert echoes(machine)

    def test_paused_machine_keeps_its_connections(self, machine: Machine) -> None:
        server, port = serve(machine)
        with server:
            job = machine.start("result = echo(connect(port))", port=port)
            with server.accept()[0] as sock:
                sock.sendall(b"before")
                assert sock.recv(10) == b"before"
                machine.monitor("stop")
                sock.sendall(b"meanwhile")
                machine.monitor("cont")
                assert sock.recv(10) == b"meanwhile"
                assert exchange(sock, MIB)
            assert job.result() == MIB + 15

    def test_device_is_killed_and_replaced(self, machine: Machine) -> None:
        """The host's programs see the end of their streams at once.

        The guest sees it when the device is unplugged, and works again with the next one.  (With
        ``reconnect-ms``, QEMU does not tell the new device about the memory.)
        """
        server, port = serve(machine)
        with server:
            job = machine.start("s = connect(port); s.sendall(b'x'); s.recv(1)", port=port)
            with server.accept()[0] as sock:
                assert sock.recv(1) == b"x"
                machine.kill_device()
                assert sock.recv(1) == b""
            with pytest.raises(GuestError) as failed:
                machine.run("connect(port)", port=port)
            assert failed.value.errno == errno.ETIMEDOUT
            machine.start_device()
            machine.replug()
            with pytest.raises(GuestError) as failed:
                job.result()
            assert failed.value.errno == errno.ECONNRESET
        wait_until(lambda: has_virtio_device(machine), "the guest to take the device", PATIENCE)
        assert echoes(machine)


def test_packed_rings(stage: Stage, fabric_of_machines: PrivateFabric) -> None:
    with stage.machine(fabric_of_machines, "newest", device="virtio", packed=True) as machine:
        machine.run(COMMON)
        bits = "open('/sys/bus/virtio/drivers/vmw_vsock_virtio_transport/virtio0/features').read()"
        assert machine.run(f"result = {bits}")[34] == "1"
        TestStreams().test_guest_connects_and_echoes(machine)
        TestStreams().test_host_connects_and_guest_echoes(machine)
        TestStreams().test_large_writes(machine)
        TestStreams().test_two_hundred_streams_at_once(machine)
        TestLife().test_paused_machine_keeps_its_connections(machine)
        TestLife().test_driver_is_reloaded(machine)
