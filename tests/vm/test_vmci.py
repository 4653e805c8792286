"""A stock guest over the VMCI device: datagrams, and its life cycle."""

from __future__ import annotations

import errno

import pytest

from forms import choose
from vsockets.limits import MAX_DATAGRAM
from vsockets.testing import PrivateFabric, wait_until

from .conftest import COMMON
from .exchanges import MIB, PATIENCE, datagram, dial, exchange, serve
from .machine import GuestError, Machine

RELOADS = choose(5, 50)


def test_stock_driver_is_bound(machine: Machine) -> None:
    drivers = machine.run("result = os.listdir('/sys/bus/pci/drivers/vmw_vmci')")
    assert any(name.startswith("0000:") for name in drivers)
    command = "import fcntl\nwith open('/dev/vsock') as f: b = fcntl.ioctl(f, 0x7b9, bytes(4))\n"
    assert machine.run(command + "result = struct.unpack('I', b)[0]") == machine.cid


class TestDatagrams:
    def test_all_sizes_in_both_directions(self, machine: Machine) -> None:
        sizes = [1, 7, 8, 100, 4071, 4072, 4073, 20_000, 65_536, MAX_DATAGRAM]
        with datagram(machine) as sock:
            job = machine.start(
                """
                s = dgram(); result = []
                for n in sizes:
                    s.sendto(os.urandom(n), (2, port))
                    data, source = s.recvfrom(1 << 20)
                    result.append((len(data), source))
                    s.sendto(data, (2, port))
                """,
                sizes=sizes,
                port=sock.getsockname()[1],
            )
            for size in sizes:
                data, source = sock.recvfrom(MIB)
                assert len(data) == size
                assert source[0] == machine.cid
                sock.sendto(data[::-1], source)
                assert sock.recv(MIB) == data[::-1]
            assert job.result() == [(size, sock.getsockname()) for size in sizes]

    def test_errors_of_sends(self, machine: Machine) -> None:
        for destination, size, code in [
            ((2, 9), MAX_DATAGRAM + 1, errno.EMSGSIZE),
            ((2, 9), 1, errno.EHOSTUNREACH),
            ((999, 9), 1, errno.EHOSTUNREACH),
        ]:
            with pytest.raises(GuestError) as failed:
                machine.run("dgram().sendto(bytes(n), to)", n=size, to=destination)
            assert failed.value.errno == code

    def test_bursts_lose_no_datagram(self, machine: Machine) -> None:
        with datagram(machine) as sock:
            job = machine.start(
                """
                s = dgram(5001)
                for i in range(100): s.sendto(b'%d' % i, (2, port))
                result = [s.recv(100) for i in range(100)]
                """,
                port=sock.getsockname()[1],
            )
            assert [sock.recv(100) for _ in range(100)] == [b"%d" % i for i in range(100)]
            for number in range(100):
                sock.sendto(b"%d" % number, (machine.cid, 5001))
            assert job.result() == [b"%d" % i for i in range(100)]

    def test_many_ports_and_a_reserved_port(self, machine: Machine) -> None:
        with datagram(machine) as sock:
            machine.run(
                "for n in [700, *range(20000, 20100)]: dgram(n).sendto(b'x', (2, port))",
                port=sock.getsockname()[1],
            )
            sources = [sock.recvfrom(10)[1] for _ in range(101)]
        assert sorted(sources) == [(machine.cid, n) for n in [700, *range(20_000, 20_100)]]


class TestLife:
    @pytest.mark.parametrize("change", ["suspend", "migrate", "ft"])
    def test_connections_are_dropped(
        self, machine: Machine, fabric_of_machines: PrivateFabric, change: str
    ) -> None:
        control = fabric_of_machines.control
        server, port = serve(machine)
        with server:
            wait = "s.sendall(b'x'); result = s.recv(1)"
            jobs = [
                machine.start(f"s = connect(port); {wait}", port=port),
                machine.start(f"s, _ = listener(6003).accept(); {wait}"),
            ]
            with server.accept()[0] as accepted, dial(machine, 6003) as dialled:
                assert accepted.recv(1) == dialled.recv(1) == b"x"
                if change == "suspend":
                    control.suspend(machine.cid)
                    control.resume(machine.cid)
                elif change == "migrate":
                    control.migrate(machine.cid)
                else:
                    control.fault_tolerance(machine.cid, True)
                    with pytest.raises(GuestError):
                        machine.run("connect(port)", port=port)
                    control.fault_tolerance(machine.cid, False)
                assert accepted.recv(1) == dialled.recv(1) == b""
            assert [job.result() for job in jobs] == [b"", b""]
            job = machine.start("result = echo(connect(port))", port=port)
            with server.accept()[0] as sock:
                assert exchange(sock, 1000)
            assert job.result() == 1000

    def test_guest_suspends_to_memory(self, machine: Machine) -> None:
        """The guest suspends to memory (S3); QEMU wakes it with a reset of its devices."""
        server, port = serve(machine)
        with server:
            before = machine.start(
                """
                s = connect(port); s.sendall(b'x')
                try: result = s.recv(1)
                except OSError: result = b''
                """,
                port=port,
            )
            with server.accept()[0] as sock:
                assert sock.recv(1) == b"x"
                job = machine.start(
                    """
                    with open('/sys/power/mem_sleep', 'w') as f: f.write('deep')
                    with open('/sys/power/state', 'w') as f: f.write('mem')
                    """
                )

                def sleeps() -> bool:
                    return bool(machine.monitor("query-status")["status"] == "suspended")

                wait_until(sleeps, "the guest to sleep", PATIENCE)
                machine.monitor("system_wakeup")
                job.result()
                assert sock.recv(1) == b""
            assert before.result() == b""
            job = machine.start("result = echo(connect(port))", port=port)
            with server.accept()[0] as sock:
                assert exchange(sock, 1000)
            assert job.result() == 1000
        job = machine.start("result = echo(listener(6004).accept()[0])")
        with dial(machine, 6004) as sock:
            assert exchange(sock, 1000)
        assert job.result() == 1000

    def test_driver_is_reloaded(self, machine: Machine) -> None:
        server, port = serve(machine)
        machine.run(
            """
            for fd in os.listdir('/proc/self/fd'):  # sockets left open by earlier tests
                try:
                    if os.readlink('/proc/self/fd/' + fd).startswith('socket:'): os.close(int(fd))
                except OSError: pass
            """
        )
        with server:
            machine.run(
                """
                import os
                def reload():
                    # The kernel drops a socket's last reference a second after its accept.
                    deadline = time.monotonic() + 8
                    while os.system('rmmod ' + names[2]):
                        assert time.monotonic() < deadline, open('/proc/modules').read()
                        time.sleep(0.1)
                    for n in (1, 0): assert not os.system('rmmod ' + names[n])
                    for n in (0, 1, 2): assert not os.system(f'insmod /modules/{names[n]}.ko')
                for i in range(times): reload()
                """,
                timeout=120,
                times=RELOADS,
                names=("vmw_vmci", "vsock", "vmw_vsock_vmci_transport"),
            )
            job = machine.start("result = echo(connect(port))", port=port)
            with server.accept()[0] as sock:
                assert exchange(sock, 1000)
            assert job.result() == 1000

    # To the device, a boot is one whatever boots: one kernel is enough.
    @pytest.mark.parametrize("machine", ["stable"], indirect=True)
    def test_killed_guest_boots_again(self, machine: Machine) -> None:
        server, port = serve(machine)
        with server:
            machine.start("s = connect(port)\nwhile True: s.sendall(bytes(65536))", port=port)
            with server.accept()[0] as sock:
                sock.recv(MIB)
                machine.kill_qemu()
                while sock.recv(MIB):
                    pass
            machine.boot()
            machine.run(COMMON)
            job = machine.start("result = echo(connect(port))", port=port)
            with server.accept()[0] as sock:
                assert exchange(sock, 1000)
            assert job.result() == 1000
