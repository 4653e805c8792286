"""Hybrid vsock with a real peer: Debian's vhost-device-vsock and a stock guest."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from typing import Any

import pytest

import vsockets
from vsockets.testing import PrivateFabric, wait_until

from .conftest import COMMON, Stage
from .exchanges import MIB, PATIENCE, dial, serve
from .machine import GuestError
from .rust_machine import HybridMachine

BLOCKS = 8
BLOCK = bytes(range(251)) * 4000

_GUEST = f"""
block = bytes(range(251)) * 4000
def send(s):
    for i in range({BLOCKS}): s.sendall(block)
def receive(s):
    data = bytearray()
    while len(data) < {BLOCKS} * len(block) and (piece := s.recv(1 << 18)): data += piece
    return data == block * {BLOCKS}
"""
SEND_AND_RECEIVE = _GUEST + "s = connect(port); send(s); result = receive(s); s.sendall(b'!')"
RECEIVE_AND_SEND = _GUEST + "s = listener(6000).accept()[0]; result = receive(s); send(s)"


@pytest.fixture(scope="module")
def machine(stage: Stage, fabric_of_machines: PrivateFabric) -> Iterator[HybridMachine]:
    """Debian 12's kernel: this back end does not accept every packet of newer ones."""
    cid = fabric_of_machines.control.add_context()["cid"]  # outlives the device
    machine = stage.machine(
        fabric_of_machines, "stable", cid=cid, device="virtio", kind=HybridMachine
    )
    assert isinstance(machine, HybridMachine)
    with machine:
        machine.run(COMMON)
        yield machine


def wait_until_reachable(machine: HybridMachine, port: int) -> None:
    """Wait until the guest can connect to ``port`` of the host."""
    path = machine.uds_path.with_name(f"{machine.uds_path.name}_{port}")
    wait_until(path.exists, f"the socket of port {port}", PATIENCE)


def send(sock: Any) -> None:
    """Send all blocks."""
    for _ in range(BLOCKS):
        sock.sendall(BLOCK)


def receive(sock: Any) -> bool:
    """Receive all blocks; return whether they are correct."""
    sock.settimeout(PATIENCE)
    data = bytearray()
    while len(data) < BLOCKS * len(BLOCK) and (piece := sock.recv(MIB)):
        data += piece
    return data == BLOCK * BLOCKS


def echoes(sock: Any) -> bool:
    """Return whether the peer echoes data."""
    sock.settimeout(PATIENCE)
    sock.sendall(b"question")
    return bool(sock.recv(100) == b"question")


class TestFromTheGuest:
    def test_large_transfers_in_both_directions(self, machine: HybridMachine) -> None:
        """One direction after the other: this back end does not support both at once."""
        server, port = serve(machine)
        with server:
            wait_until_reachable(machine, port)
            job = machine.start(SEND_AND_RECEIVE, port=port)
            sock, peer = server.accept()
            with sock:
                assert peer[0] == machine.cid
                assert receive(sock)
                send(sock)
                assert sock.recv(1) == b"!"
            assert job.result() is True

    def test_connects(self, machine: HybridMachine) -> None:
        server, port = serve(machine)
        with server:
            wait_until_reachable(machine, port)
            job = machine.start(
                """
                for i in range(200):
                    s = connect(port); s.sendall(b'%d' % i); assert s.recv(10) == b'%d' % i
                    s.close()
                """,
                port=port,
            )
            for _ in range(200):
                with server.accept()[0] as sock:
                    sock.sendall(sock.recv(10))
                    assert sock.recv(10) == b""
            job.result()

    def test_many_streams_at_once(self, machine: HybridMachine) -> None:
        server, port = serve(machine)
        with server:
            wait_until_reachable(machine, port)
            job = machine.start(
                """
                all = [connect(port) for i in range(50)]
                for i, s in enumerate(all): s.sendall(b'%d' % i)
                result = [s.recv(10) for s in all]
                """,
                port=port,
            )
            socks = [server.accept()[0] for _ in range(50)]
            for sock in socks:
                sock.sendall(sock.recv(10))
            assert job.result() == [b"%d" % i for i in range(50)]
            for sock in socks:
                sock.close()

    def test_closed_port_refuses(self, machine: HybridMachine) -> None:
        server, port = serve(machine)
        wait_until_reachable(machine, port)
        server.close()
        path = machine.uds_path.with_name(f"{machine.uds_path.name}_{port}")
        wait_until(lambda: not path.exists(), "removal of the port's socket", PATIENCE)
        with pytest.raises(GuestError) as failed:
            machine.run("connect(port)", port=port)
        # This back end does not always reply; Linux then waits for two seconds.
        assert failed.value.errno in (errno.ECONNRESET, errno.ETIMEDOUT)


class TestToTheGuest:
    def test_large_transfers_in_both_directions(self, machine: HybridMachine) -> None:
        job = machine.start(RECEIVE_AND_SEND)
        with dial(machine, 6000) as sock:
            assert sock.getpeername() == (machine.cid, 6000)
            send(sock)
            assert receive(sock)
        assert job.result() is True

    def test_guest_sends_first(self, machine: HybridMachine) -> None:
        job = machine.start("s = listener(6001).accept()[0]; s.sendall(b'220 guest'); s.recv(1)")
        with dial(machine, 6001) as sock:
            assert sock.recv(100) == b"220 guest"
            sock.sendall(b"x")
        job.result()

    def test_connects(self, machine: HybridMachine) -> None:
        job = machine.start(
            """
            l = listener(6002)
            for i in range(200):
                s = l.accept()[0]; s.sendall(s.recv(10)); s.recv(1); s.close()
            """
        )
        for number in range(200):
            with dial(machine, 6002) as sock:
                sock.sendall(b"%d" % number)
                assert sock.recv(10) == b"%d" % number
        job.result()

    def test_port_without_listener_refuses(self, machine: HybridMachine) -> None:
        with pytest.raises(ConnectionResetError):
            vsockets.create_connection((machine.cid, 9), context=machine.host)

    def test_host_closes(self, machine: HybridMachine) -> None:
        """This back end turns a half-close into a full close, and does not report its guest's."""
        job = machine.start(
            """
            s = listener(6003).accept()[0]; n = 0
            while data := s.recv(1 << 20): n += len(data)
            result = n
            """
        )
        with dial(machine, 6003) as sock:
            sock.sendall(bytes(50_000))
        assert job.result() == 50_000


class TestBesideThePlayedOne:
    """Facts that tests/played asserts of a played Firecracker: this back end is of its origin."""

    def ask(self, machine: HybridMachine, *pieces: bytes) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE)
        sock.connect(str(machine.uds_path))
        for piece in pieces:
            sock.sendall(piece)
        return sock

    def test_ok_and_data(self, machine: HybridMachine) -> None:
        job = machine.start("s, peer = listener(6100).accept(); result = s.recv(5), peer")
        with dial_raw(self, machine, b"CONNECT 6100\n") as sock:
            line = sock.recv(64)
            sock.sendall(b"hello")  # in the same write as the line this back end would lose it
            data, (cid, port) = job.result()
            assert (data, cid) == (b"hello", 2)
            # A difference: Firecracker's line has the port of the host's end, from 2**30 on.
            assert line == b"OK 6100\n"
            assert port < 1 << 30

    def test_missing_listener_ends_the_stream(self, machine: HybridMachine) -> None:
        with self.ask(machine, b"CONNECT 6199\n") as sock:
            assert sock.recv(1) == b""

    def test_a_line_in_pieces_ends_it(self, machine: HybridMachine) -> None:
        with self.ask(machine, b"CONN") as sock:
            assert sock.recv(1) == b""

    def test_half_close_of_the_host_ends_both_directions(self, machine: HybridMachine) -> None:
        job = machine.start(
            """
            s = listener(6101).accept()[0]
            data = b''
            while piece := s.recv(100): data += piece
            try: s.sendall(b'answer'); result = data, 'sent'
            except OSError as error: result = data, error.errno
            """
        )
        with dial_raw(self, machine, b"CONNECT 6101\n") as sock:
            assert sock.recv(3) == b"OK "
            sock.sendall(b"request")
            sock.shutdown(socket.SHUT_WR)
            assert job.result() == (b"request", errno.EPIPE)


def dial_raw(test: TestBesideThePlayedOne, machine: HybridMachine, line: bytes) -> socket.socket:
    """Connect by ``line``; repeat it until the guest listens."""
    while True:
        sock = test.ask(machine, line)
        if sock.recv(1, socket.MSG_PEEK):
            return sock
        sock.close()


def test_device_is_killed_and_restarted(machine: HybridMachine) -> None:
    server, port = serve(machine)
    with server:
        wait_until_reachable(machine, port)
        machine.start("s = connect(port)\nwhile data := s.recv(100): s.sendall(data)", port=port)
        sock, _ = server.accept()
        with sock:
            machine.detach()
            assert echoes(sock)  # the device was not in the data path
        machine.attach()
        # Sockets of the first device still exist and lead nowhere until they are replaced.
        machine.start(
            """
            deadline = time.monotonic() + 20
            while True:
                try: s = connect(port); break
                except OSError:
                    if time.monotonic() > deadline: raise
            while data := s.recv(100): s.sendall(data)
            """,
            port=port,
        )
        with server.accept()[0] as sock:
            assert echoes(sock)
