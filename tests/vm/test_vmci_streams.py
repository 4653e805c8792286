"""Streams between the AF_VSOCK programs of a stock guest and the host's, over the VMCI device."""

from __future__ import annotations

import errno
import select
import socket

import pytest

import vsockets
from forms import choose
from vsockets import AF_VSOCK
from vsockets.testing import PrivateFabric

from .exchanges import MIB, PATIENCE, dial, echo_one_stream, exchange, serve
from .machine import GuestError, Machine

#: Bytes that are echoed: several hundred times what a stream's buffers hold.
ECHOED = choose(64, 256) * MIB

#: Streams one after the other.
CONNECTS = choose(250, 1000)

SIZES = [128, 129, 1000, 4096, 5000, 65_536, 100_001, 262_144]


class TestStreams:
    def test_guest_connects_and_echoes(self, machine: Machine) -> None:
        server, port = serve(machine)
        with server:
            job = machine.start("result = echo(connect(port))", port=port)
            sock, peer = server.accept()
            assert peer[0] == machine.cid
            with sock:
                assert exchange(sock, ECHOED)
            assert job.result() == ECHOED

    def test_host_connects_and_guest_echoes(self, machine: Machine) -> None:
        job = machine.start("result = echo(listener(6000).accept()[0])")
        with dial(machine, 6000) as sock:
            assert sock.getpeername() == (machine.cid, 6000)
            assert exchange(sock, ECHOED)
        assert job.result() == ECHOED

    @pytest.mark.parametrize("size", [*SIZES, 1_000_003, 16 * MIB])
    def test_buffer_sizes(self, machine: Machine, size: int) -> None:
        server, port = serve(machine)
        with server:
            server.setsockopt(AF_VSOCK, vsockets.SO_VM_SOCKETS_BUFFER_MAX_SIZE, 1 << 26)
            server.listen()
            job = machine.start(
                "s = stream(); sizes(s, size); s.connect((2, port)); result = echo(s)",
                size=size,
                port=port,
            )
            sock, _ = server.accept()
            with sock:
                option = sock.getsockopt(AF_VSOCK, vsockets.SO_VM_SOCKETS_BUFFER_SIZE, 8)
                assert int.from_bytes(option, "little") == size
                total = min(3 * size + 17, 4 * MIB)
                fine = exchange(sock, total)
            assert (job.result(), fine) == (total, True)

    @pytest.mark.parametrize("size", [128, 5000, 100_001])
    def test_buffer_sizes_of_the_host(self, machine: Machine, size: int) -> None:
        job = echo_one_stream(machine, 7000 + size)
        with vsockets.socket(AF_VSOCK, socket.SOCK_STREAM, context=machine.host) as sock:
            sock.setsockopt(AF_VSOCK, vsockets.SO_VM_SOCKETS_BUFFER_SIZE, size)
            sock.connect((machine.cid, 7000 + size))
            assert exchange(sock, 3 * size + 17)
        assert job.result() == 3 * size + 17

    def test_many_connects(self, machine: Machine) -> None:
        server, port = serve(machine)
        with server:
            job = machine.start(
                """
                for i in range(count):
                    s = connect(port); s.sendall(b'%d' % i); assert s.recv(10) == b'%d' % i
                    s.close()
                """,
                port=port,
                count=CONNECTS,
            )
            for _ in range(CONNECTS):
                with server.accept()[0] as sock:
                    sock.sendall(sock.recv(10))
                    assert sock.recv(10) == b""
            job.result(60)

    def test_hundred_streams_at_once(self, machine: Machine) -> None:
        server, port = serve(machine)
        with server:
            job = machine.start(
                """
                all = [connect(port) for i in range(100)]
                for i, s in enumerate(all): s.sendall(b'%d' % i)
                result = [s.recv(10) for s in all]
                """,
                port=port,
            )
            socks = [server.accept()[0] for _ in range(100)]
            for sock in socks:
                sock.sendall(sock.recv(10))
            assert job.result() == [b"%d" % i for i in range(100)]
            for sock in socks:
                sock.close()

    def test_half_close_of_the_guest(self, machine: Machine) -> None:
        server, port = serve(machine)
        with server:
            job = machine.start(
                """
                s = connect(port); s.sendall(bytes(200000)); s.shutdown(1)
                result = s.recv(10), s.recv(10)
                """,
                port=port,
            )
            with server.accept()[0] as sock:
                assert sum(map(len, iter(lambda: sock.recv(MIB), b""))) == 200_000
                sock.sendall(b"after")
            assert job.result() == (b"after", b"")

    def test_half_close_of_the_host(self, machine: Machine) -> None:
        server, port = serve(machine)
        with server:
            job = machine.start(
                """
                s = connect(port); n = 0
                while data := s.recv(1 << 20): n += len(data)
                s.sendall(b'after'); result = n
                """,
                port=port,
            )
            with server.accept()[0] as sock:
                sock.sendall(bytes(500_000))
                sock.shutdown(socket.SHUT_WR)
                assert sock.recv(10) == b"after"
            assert job.result() == 500_000

    def test_host_closes(self, machine: Machine) -> None:
        """A reader sees the end, a writer EPIPE, and all data sent before is read."""
        server, port = serve(machine)
        with server:
            job = machine.start(
                """
                s = connect(port); n = 0
                while data := s.recv(1 << 20): n += len(data)
                try:
                    while True: s.sendall(bytes(65536))
                except BrokenPipeError: result = n
                """,
                port=port,
            )
            sock, _ = server.accept()
            with sock:
                sock.sendall(bytes(100_000))
            assert job.result() == 100_000

    def test_host_closes_while_the_guest_writes(self, machine: Machine) -> None:
        server, port = serve(machine)
        with server:
            job = machine.start(
                """
                s = connect(port)
                try:
                    while True: s.sendall(bytes(65536))
                except BrokenPipeError: result = 'EPIPE'
                """,
                port=port,
            )
            sock, _ = server.accept()
            with sock:
                sock.recv(MIB)
            assert job.result() == "EPIPE"

    def test_guest_closes_without_loss(self, machine: Machine) -> None:
        server, port = serve(machine)
        with server:
            machine.run("s = connect(port); s.sendall(bytes(262143)); s.close()", port=port)
            with server.accept()[0] as sock:
                assert sum(map(len, iter(lambda: sock.recv(MIB), b""))) == 262_143

    def test_connects_without_listener_are_refused(self, machine: Machine) -> None:
        for cid, codes in [
            (2, {errno.ECONNRESET}),
            # Newer kernels refuse CIDs of other guests themselves.
            (999, {errno.EHOSTUNREACH, errno.ENODEV}),
        ]:
            with pytest.raises(GuestError) as failed:
                machine.run("connect(9, cid)", cid=cid)
            assert failed.value.errno in codes
        with pytest.raises(ConnectionResetError):
            vsockets.create_connection((machine.cid, 9), context=machine.host)

    def test_backlog_of_the_guest(self, machine: Machine) -> None:
        machine.run("import sys; sys.full = listener(6001, 1)")
        socks = []
        with pytest.raises(ConnectionResetError):
            for _ in range(10):
                socks.append(vsockets.create_connection((machine.cid, 6001), context=machine.host))
        assert socks
        for sock in socks:
            sock.close()
        machine.run("import sys; sys.full.close()")  # with its streams, which hold the driver

    def test_backlog_of_the_host(self, machine: Machine) -> None:
        with vsockets.create_server(
            (2, vsockets.VMADDR_PORT_ANY), context=machine.host, backlog=1
        ) as server:
            job = machine.start(
                """
                result = []
                try:
                    while len(result) < 10: result.append(connect(port))
                except ConnectionResetError: result = len(result)
                """,
                port=server.getsockname()[1],
            )
            assert 0 < job.result() < 10

    def test_signals_lose_no_data(self, machine: Machine) -> None:
        """A guest program that is interrupted constantly loses no data."""
        server, port = serve(machine)
        with server:
            job = machine.start(
                """
                import os
                child = os.fork()
                if not child:
                    signal.signal(signal.SIGALRM, lambda *_: None)
                    s = connect(port)  # before the signals, which would interrupt it
                    signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
                    os._exit(echo(s) != total)
                result = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                """,
                port=port,
                total=4 * MIB,
            )
            with server.accept()[0] as sock:
                sock.settimeout(PATIENCE)
                assert exchange(sock, 4 * MIB)
            assert job.result() == 0

    def test_non_blocking_connects(self, machine: Machine) -> None:
        job = echo_one_stream(machine, 6002)
        with vsockets.socket(AF_VSOCK, socket.SOCK_STREAM, context=machine.host) as sock:
            sock.setblocking(False)
            assert sock.connect_ex((machine.cid, 6002)) == errno.EINPROGRESS
            poll = select.poll()
            poll.register(sock, select.POLLOUT)
            assert poll.poll(PATIENCE * 1000)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
            sock.settimeout(PATIENCE)
            assert exchange(sock, 1000)
        assert job.result() == 1000

    def test_reserved_ports_belong_to_the_guest_kernel(self, machine: Machine) -> None:
        server, port = serve(machine)
        with server:
            machine.start("s = stream(); s.bind((ANY, 1000)); s.connect((2, port))", port=port)
            sock, peer = server.accept()
            sock.close()
            assert peer == (machine.cid, 1000)

    def test_services_of_the_hypervisor(
        self, machine: Machine, fabric_of_machines: PrivateFabric
    ) -> None:
        with vsockets.create_server((0, 9760), context=fabric_of_machines.hypervisor) as server:
            job = machine.start("result = echo(connect(9760, 0))")
            server.settimeout(PATIENCE)
            with server.accept()[0] as sock:
                assert exchange(sock, 1000)
            assert job.result() == 1000
