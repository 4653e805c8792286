"""Uncommon devices and guests: older drivers, the older protocol, two guests."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import vsockets
from vsockets import AF_VSOCK
from vsockets.testing import PrivateFabric

from .conftest import COMMON, Stage
from .exchanges import PATIENCE, datagram, dial, exchange, serve
from .machine import GuestError, Machine

CIDS = (50, 51)


def test_datagrams_and_streams_over_io_ports(
    stage: Stage, fabric_of_machines: PrivateFabric
) -> None:
    """For drivers before Linux 5.18: every byte of a datagram causes a VM exit."""
    with stage.machine(fabric_of_machines, "stable", "--legacy") as machine:
        machine.run(COMMON)
        with datagram(machine) as sock:
            job = machine.start(
                """
                s = dgram()
                for n in sizes: s.sendto(bytes(n), (2, port))
                result = [len(s.recv(1 << 20)) for n in sizes]
                """,
                sizes=[1, 5000, 100],
                port=sock.getsockname()[1],
            )
            received = [sock.recvfrom(1 << 20) for _ in range(3)]
            for data, source in received:
                sock.sendto(data, source)
            assert job.result(60) == [1, 5000, 100]
        server, port = serve(machine)
        with server:
            job = machine.start(
                """
                s = stream()
                # A connect exceeds the default timeout of the guest's kernel; Python does not
                # support structures as options of AF_VSOCK sockets.
                with socket.socket(socket.AF_UNIX, fileno=os.dup(s.fileno())) as same:
                    same.setsockopt(AF, 6, struct.pack("qq", 30, 0))
                s.connect((2, port))
                result = echo(s)
                """,
                port=port,
            )
            with server.accept()[0] as sock:
                sock.settimeout(60)
                assert exchange(sock, 300_000)
            assert job.result(60) == 300_000


def test_protocol_version_1(stage: Stage, fabric_of_machines: PrivateFabric) -> None:
    """INVALID, REQUEST, NEGOTIATE, and flow control with requests by each side."""
    with stage.machine(fabric_of_machines, "stable", "--protocol-1") as machine:
        machine.run(COMMON)
        server, port = serve(machine)
        with server:
            job = machine.start("result = echo(connect(port))", port=port)
            with server.accept()[0] as sock:
                sock.settimeout(30)
                assert exchange(sock, 16 << 20)
            assert job.result() == 16 << 20
        job = machine.start("result = echo(listener(6000).accept()[0])")
        with dial(machine, 6000) as sock:
            sock.settimeout(30)
            assert exchange(sock, 16 << 20)
        assert job.result() == 16 << 20


@pytest.fixture(scope="module")
def siblings(stage: Stage, fabric_of_machines: PrivateFabric) -> Iterator[tuple[Machine, Machine]]:
    """Two unrestricted guests with the legacy profile."""
    for cid in CIDS:
        fabric_of_machines.control.add_context(cid, profile="legacy", unrestricted=True)
    first = stage.machine(fabric_of_machines, "stable", cid=CIDS[0])
    second = stage.machine(fabric_of_machines, "stable", cid=CIDS[1])
    with first, second:
        first.run(COMMON)
        second.run(COMMON)
        yield first, second


def test_monitor_maps_registers(siblings: tuple[Machine, Machine]) -> None:
    for machine in siblings:
        assert machine.qemu is not None
        maps = Path(f"/proc/{machine.qemu.pid}/maps").read_text()
        assert "memfd:vfio-user-region" in maps


class TestTwoGuests:
    def test_streams(self, siblings: tuple[Machine, Machine]) -> None:
        first, second = siblings
        server = second.start(
            "global l; l = listener(6000); s, a = l.accept(); echo(s); result = a[0]"
        )
        result = first.run(
            """
            while True:
                try: s = connect(6000, peer)
                except ConnectionResetError: time.sleep(0.1)
                else: break
            s.sendall(bytes(100000)); s.shutdown(1); n = 0
            while data := s.recv(65536): n += len(data)
            result = n
            """,
            peer=second.cid,
        )
        assert result == 100_000
        assert server.result() == first.cid

    def test_datagrams(self, siblings: tuple[Machine, Machine]) -> None:
        first, second = siblings
        receiver = second.start("result = dgram(6001).recvfrom(100)")
        first.run(
            """
            s = dgram(6002)
            for i in range(20):
                s.sendto(b'hello', (peer, 6001)); time.sleep(0.05)
            """,
            peer=second.cid,
        )
        assert receiver.result() == (b"hello", (first.cid, 6002))

    def test_default_profile_is_isolated(
        self, siblings: tuple[Machine, Machine], fabric_of_machines: PrivateFabric
    ) -> None:
        """A guest with the default profile cannot reach other guests, nor they it."""
        machine = siblings[0]
        other = fabric_of_machines.guest(60)
        with vsockets.create_server((60, 5000), context=other):
            with pytest.raises(GuestError) as failed:
                machine.run("connect(5000, 60)")
            assert failed.value.errno == errno.EHOSTUNREACH
            with pytest.raises(GuestError) as failed:
                machine.run("dgram().sendto(b'x', (60, 5000))")
            assert failed.value.errno == errno.EHOSTUNREACH
        with pytest.raises(OSError) as refused:
            vsockets.create_connection((machine.cid, 6000), context=other)
        assert refused.value.errno == errno.EHOSTUNREACH
        with vsockets.socket(AF_VSOCK, socket.SOCK_DGRAM, context=other) as sock:
            sock.settimeout(PATIENCE)
            with pytest.raises(OSError) as refused:
                sock.sendto(b"x", (machine.cid, 6001))
            assert refused.value.errno == errno.EHOSTUNREACH
