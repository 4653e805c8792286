"""``vsock device hybrid`` with a simulated Firecracker, in both directions.

The tests include bugs of other projects, cited by their issues.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import vsockets
from vsockets import VMADDR_PORT_ANY
from vsockets.testing import PrivateFabric, wait_until

from .simulated_firecracker import PATIENCE, HybridDevice, SimulatedFirecracker, read_all, read_line


@contextlib.contextmanager
def connecting(fabric: PrivateFabric, cid: int, port: int) -> Iterator[vsockets.socket]:
    """A pending connect of a program of the host."""
    with vsockets.socket(context=fabric.host) as sock:
        sock.setblocking(False)
        assert sock.connect_ex((cid, port)) == errno.EINPROGRESS
        yield sock


def finish(sock: vsockets.socket) -> int:
    """Wait for the end of a connect; return 0 or its errno."""
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    assert poll.poll(PATIENCE * 1000)
    error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    sock.settimeout(PATIENCE)
    return int(error)


@contextlib.contextmanager
def joined(
    fabric: PrivateFabric,
    device: HybridDevice,
    firecracker: SimulatedFirecracker,
    more: bytes = b"",
) -> Iterator[tuple[vsockets.socket, socket.socket]]:
    """Yield both ends of a stream from the host to the guest's port 52."""
    with connecting(fabric, device.cid, 52) as sock, firecracker.accepts(52, more) as guest:
        assert finish(sock) == 0
        yield sock, guest


@contextlib.contextmanager
def serving(fabric: PrivateFabric, firecracker: SimulatedFirecracker) -> Iterator[vsockets.socket]:
    """Yield a listener of the host that the guest can connect to."""
    address = (2, VMADDR_PORT_ANY)
    with vsockets.create_server(address, backlog=1000, context=fabric.host) as server:
        server.settimeout(PATIENCE)
        port = server.getsockname()[1]
        wait_until(lambda: port in firecracker.ports(), "the port", PATIENCE)
        yield server


@contextlib.contextmanager
def connected(
    fabric: PrivateFabric, firecracker: SimulatedFirecracker, more: bytes = b""
) -> Iterator[tuple[socket.socket, vsockets.socket]]:
    """Yield both ends of a stream from the guest to the host, after the guest sent ``more``."""
    with (
        serving(fabric, firecracker) as server,
        firecracker.connects(server.getsockname()[1]) as guest,
    ):
        guest.sendall(more)
        sock, _ = server.accept()
        with sock:
            sock.settimeout(PATIENCE)
            yield guest, sock


def exchange(one: socket.socket, other: socket.socket, data: bytes) -> None:
    """Send ``data`` in both directions at once, half-close each, and compare digests."""
    received: dict[socket.socket, bytes] = {}

    def send(sock: socket.socket) -> None:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    def receive(sock: socket.socket) -> None:
        received[sock] = hashlib.sha256(read_all(sock)).digest()

    threads = [threading.Thread(target=f, args=(s,)) for s in (one, other) for f in (send, receive)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert received == dict.fromkeys((one, other), hashlib.sha256(data).digest())


class TestToTheGuest:
    def test_a_stream(
        self, fabric: PrivateFabric, device: HybridDevice, firecracker: SimulatedFirecracker
    ) -> None:
        with joined(fabric, device, firecracker) as (sock, guest):
            assert sock.getpeername() == (device.cid, 52)
            assert sock.getsockname()[0] == 2
            exchange(sock, guest, os.urandom(1 << 20) * 4)

    def test_payload_after_the_handshake_line_is_forwarded(
        self, fabric: PrivateFabric, device: HybridDevice, firecracker: SimulatedFirecracker
    ) -> None:
        """Payload in the same write as the handshake's line is not lost."""
        with joined(fabric, device, firecracker, b"SSH-2.0-guest\r\n") as (sock, guest):
            assert sock.recv(100) == b"SSH-2.0-guest\r\n"
            guest.sendall(b"more")
            assert sock.recv(100) == b"more"

    def test_reply_split_into_pieces(
        self, fabric: PrivateFabric, device: HybridDevice, firecracker: SimulatedFirecracker
    ) -> None:
        """vhost-device#663: the newline arrives after the number."""
        with connecting(fabric, device.cid, 52) as sock:
            guest, _ = firecracker.asked()
            with guest:
                for piece in (b"O", b"K 12", b"34", b"\nfirst"):
                    guest.sendall(piece)
                assert finish(sock) == 0
                assert sock.recv(100) == b"first"

    @pytest.mark.parametrize(
        "answer", [b"", b"OK 1", b"OK x\n", b"ERR 1\n", b"O" * 40, b"\0" * 4096]
    )
    def test_invalid_or_missing_reply_fails_the_connect(
        self,
        fabric: PrivateFabric,
        device: HybridDevice,
        firecracker: SimulatedFirecracker,
        answer: bytes,
    ) -> None:
        """No listener, or not hybrid vsock: a line without an end is cut off."""
        with connecting(fabric, device.cid, 52) as sock:
            guest, line = firecracker.asked()
            with guest:
                assert line == b"CONNECT 52\n"
                guest.sendall(answer)
                guest.shutdown(socket.SHUT_WR)
                assert finish(sock) == errno.ECONNRESET
        with joined(fabric, device, firecracker) as (sock, guest):  # the device still works
            exchange(sock, guest, b"x")

    def test_refused_socket_can_connect_again(
        self, fabric: PrivateFabric, device: HybridDevice, firecracker: SimulatedFirecracker
    ) -> None:
        with vsockets.socket(context=fabric.host) as sock, ThreadPoolExecutor(1) as pool:
            sock.settimeout(PATIENCE)
            for _ in range(3):
                refused = pool.submit(sock.connect_ex, (device.cid, 52))
                firecracker.asked()[0].close()
                assert refused.result() == errno.ECONNRESET
            connected = pool.submit(sock.connect_ex, (device.cid, 52))
            with firecracker.accepts(52) as guest:
                assert connected.result() == 0
                exchange(sock, guest, b"x")

    def test_guest_without_reply_times_out(
        self, fabric: PrivateFabric, device: HybridDevice, firecracker: SimulatedFirecracker
    ) -> None:
        with pytest.raises(TimeoutError):
            vsockets.create_connection((device.cid, 52), 0.5, context=fabric.host)
        guest, _ = firecracker.asked()
        with guest:
            assert guest.recv(1) == b""

    def test_client_closes_while_connecting(
        self, fabric: PrivateFabric, device: HybridDevice, firecracker: SimulatedFirecracker
    ) -> None:
        with connecting(fabric, device.cid, 52):
            guest, _ = firecracker.asked()
        with guest:
            assert guest.recv(1) == b""

    def test_half_close_keeps_the_other_direction_open(
        self, fabric: PrivateFabric, device: HybridDevice, firecracker: SimulatedFirecracker
    ) -> None:
        """cloud-hypervisor#8300, #8372."""
        with joined(fabric, device, firecracker) as (sock, guest):
            sock.sendall(b"question")
            sock.shutdown(socket.SHUT_WR)
            assert read_all(guest) == b"question"
            for _ in range(3):
                guest.sendall(b"answer")
                assert sock.recv(100) == b"answer"
            guest.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
        with joined(fabric, device, firecracker) as (sock, guest):  # from the other side
            guest.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
            sock.sendall(b"answer")
            assert guest.recv(100) == b"answer"

    def test_slow_reader_blocks_the_sender(
        self, fabric: PrivateFabric, device: HybridDevice, firecracker: SimulatedFirecracker
    ) -> None:
        with joined(fabric, device, firecracker) as (sock, guest):
            sock.settimeout(0.2)
            sent = 0
            with pytest.raises(TimeoutError):
                while sent < 1 << 26:
                    sent += sock.send(bytes(65_536))
            sock.close()
            assert len(read_all(guest)) == sent

    @pytest.mark.parametrize("unread", [b"", b"unread"])
    def test_early_close_by_the_host(
        self,
        fabric: PrivateFabric,
        device: HybridDevice,
        firecracker: SimulatedFirecracker,
        unread: bytes,
    ) -> None:
        """cloud-hypervisor#6621, #6798: the monitor crashed when the host closed early."""
        for _ in range(20):
            with connecting(fabric, device.cid, 52) as sock:
                guest, _ = firecracker.asked()
                sock.close()
                with guest, contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    guest.sendall(b"OK 1024\n" + unread)
                    assert guest.recv(1) == b""
        assert device.process.poll() is None
        with joined(fabric, device, firecracker) as (sock, guest):
            exchange(sock, guest, b"all is well")

    def test_resets_never_affect_other_streams(
        self, fabric: PrivateFabric, device: HybridDevice, firecracker: SimulatedFirecracker
    ) -> None:
        """flintlock#1205, cloud-hypervisor#8692: resets never affect another stream."""
        for number in range(200):
            with connecting(fabric, device.cid, 52) as sock:
                guest, _ = firecracker.asked()
                with guest:
                    if number % 3 == 0:
                        guest.close()
                        assert finish(sock) == errno.ECONNRESET
                        continue
                    guest.sendall(b"OK 1024\n%d" % number)
                    assert finish(sock) == 0
                    if number % 3 == 1:  # a reset: closed with unread bytes
                        sock.sendall(b"unread")
                        guest.close()
                    assert sock.recv(100) == b"%d" % number
        wait_until(lambda: not fabric.control.status()["streams"], "all to be forgotten", PATIENCE)

    def test_many_concurrent_streams(
        self, fabric: PrivateFabric, device: HybridDevice, firecracker: SimulatedFirecracker
    ) -> None:
        pairs = []
        with contextlib.ExitStack() as stack:
            for _ in range(100):
                pairs.append(stack.enter_context(joined(fabric, device, firecracker)))
            for number, (sock, guest) in enumerate(pairs):
                guest.sendall(b"%d" % number)
                assert sock.recv(100) == b"%d" % number

    def test_connect_fails_while_the_machine_is_off(
        self, fabric: PrivateFabric, device: HybridDevice, firecracker: SimulatedFirecracker
    ) -> None:
        firecracker.power_off()
        with connecting(fabric, device.cid, 52) as sock:
            assert finish(sock) == errno.EHOSTUNREACH
        firecracker.power_on()
        with joined(fabric, device, firecracker) as (sock, guest):
            exchange(sock, guest, b"x")


def test_connect_waits_for_the_guest(
    fabric: PrivateFabric, folder: Path, firecracker: SimulatedFirecracker
) -> None:
    """firecracker#1253: the host connects before the guest listens or runs."""
    firecracker.power_off()
    with (
        HybridDevice(fabric, firecracker.path, "--wait", str(PATIENCE)) as device,
        vsockets.socket(context=fabric.host) as sock,
    ):
        sock.setblocking(False)
        sock.connect_ex((device.cid, 52))
        firecracker.power_on()
        for _ in range(2):  # the machine runs, without a listener yet
            firecracker.asked()[0].close()
        with firecracker.accepts(52) as guest:
            assert finish(sock) == 0
            exchange(sock, guest, b"at last")


class TestFromTheGuest:
    def test_a_stream(
        self, fabric: PrivateFabric, device: HybridDevice, firecracker: SimulatedFirecracker
    ) -> None:
        """One kernel socket from end to end, without the device."""
        with connected(fabric, firecracker, b"at once") as (guest, sock):
            cid, port = sock.getpeername()
            assert cid == device.cid
            assert port >= 1024
            assert sock.recv(100) == b"at once"
            device.process.send_signal(signal.SIGSTOP)
            try:
                exchange(guest, sock, os.urandom(1 << 20))
            finally:
                device.process.send_signal(signal.SIGCONT)

    def test_ports_follow_their_listeners(
        self, fabric: PrivateFabric, device: HybridDevice, firecracker: SimulatedFirecracker
    ) -> None:
        with vsockets.create_server((2, 5000), context=fabric.host):
            firecracker.wait_for(5000)
            with vsockets.create_server((2, 5001), context=fabric.host):
                firecracker.wait_for(5000, 5001)
            firecracker.wait_for(5000)
            # Similar sockets that do not count: bound to the local CID, of another type,
            # datagrams.
            with (
                vsockets.create_server((1, 5002), context=fabric.host),
                vsockets.socket(type=socket.SOCK_SEQPACKET, context=fabric.host) as packets,
                vsockets.socket(type=socket.SOCK_DGRAM, context=fabric.host) as datagrams,
                vsockets.create_server((2, 5004), context=fabric.host),
            ):
                packets.bind((2, 5003))
                packets.listen()
                datagrams.bind((2, 5003))
                firecracker.wait_for(5000, 5004)
            firecracker.wait_for(5000)
        firecracker.wait_for()
        with pytest.raises(ConnectionRefusedError):
            firecracker.connects(5000)

    def test_connects_while_device_and_vsockd_are_busy(
        self, fabric: PrivateFabric, device: HybridDevice, firecracker: SimulatedFirecracker
    ) -> None:
        with serving(fabric, firecracker) as server:
            port = server.getsockname()[1]
            os.kill(fabric.pid, signal.SIGSTOP)
            guests = [firecracker.connects(port) for _ in range(200)]
            os.kill(fabric.pid, signal.SIGCONT)
            for number, guest in enumerate(guests):
                guest.sendall(b"%d" % number)
            said = set()
            for _ in guests:
                sock, _ = server.accept()
                with sock:
                    said.add(sock.recv(100))
            assert said == {b"%d" % number for number in range(200)}
            for guest in guests:
                guest.close()

    def test_connects_beyond_the_backlog(
        self, fabric: PrivateFabric, device: HybridDevice, firecracker: SimulatedFirecracker
    ) -> None:
        with vsockets.create_server((2, 5005), backlog=1, context=fabric.host) as server:
            firecracker.wait_for(5005)
            guests = [firecracker.connects(5005) for _ in range(10)]
            refused = 0
            for guest in guests[2:]:
                with contextlib.suppress(ConnectionResetError):
                    assert guest.recv(1) == b""
                refused += 1
            assert refused == 8
            for _ in range(2):
                server.accept()[0].close()
            for guest in guests:
                guest.close()

    def test_early_closes_by_the_guest(
        self, fabric: PrivateFabric, device: HybridDevice, firecracker: SimulatedFirecracker
    ) -> None:
        with serving(fabric, firecracker) as server:
            port = server.getsockname()[1]
            for number in range(100):
                with firecracker.connects(port) as guest:
                    guest.sendall(b"%d" % number)
                sock, _ = server.accept()
                with sock:
                    assert sock.recv(100) == b"%d" % number
                    assert sock.recv(100) == b""
        assert device.process.poll() is None

    def test_half_close(
        self, fabric: PrivateFabric, device: HybridDevice, firecracker: SimulatedFirecracker
    ) -> None:
        with connected(fabric, firecracker) as (guest, sock):
            guest.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
            sock.sendall(b"answer")
            assert guest.recv(100) == b"answer"

    def test_existing_socket_of_another_program_is_kept(
        self, fabric: PrivateFabric, device: HybridDevice, firecracker: SimulatedFirecracker
    ) -> None:
        """A program that has created the unix socket itself keeps it."""
        with socket.socket(socket.AF_UNIX) as theirs:
            theirs.bind(f"{firecracker.path}_5006")
            theirs.listen()
            with vsockets.create_server((2, 5006), context=fabric.host):
                wait_until(lambda: "port 5006" in device.log, "the device to say so", PATIENCE)
                with firecracker.connects(5006) as guest:
                    theirs.accept()[0].close()
                    assert guest.recv(1) == b""
            os.unlink(f"{firecracker.path}_5006")


def test_existing_listeners_are_announced_at_start(
    fabric: PrivateFabric, firecracker: SimulatedFirecracker
) -> None:
    """Outside the class, because two devices at one path conflict."""
    with contextlib.ExitStack() as stack:
        ports = set()
        for _ in range(300):  # more than the link's buffer takes
            server = vsockets.create_server((2, VMADDR_PORT_ANY), context=fabric.host)
            ports.add(stack.enter_context(server).getsockname()[1])
        device = stack.enter_context(HybridDevice(fabric, firecracker.path))
        firecracker.wait_for(*ports)
        device.process.send_signal(signal.SIGSTOP)
        more = [
            vsockets.create_server((2, VMADDR_PORT_ANY), context=fabric.host) for _ in range(600)
        ]
        for server in more[:500]:
            server.close()
        device.process.send_signal(signal.SIGCONT)
        firecracker.wait_for(*ports, *(server.getsockname()[1] for server in more[500:]))
        for server in more[500:]:
            server.close()
        firecracker.wait_for(*ports)


class TestLife:
    @pytest.fixture
    def device(
        self, fabric: PrivateFabric, firecracker: SimulatedFirecracker
    ) -> Iterator[HybridDevice]:
        """A device for each test, as most tests end it."""
        with HybridDevice(fabric, firecracker.path) as device:
            yield device

    @pytest.fixture
    def streams(
        self, fabric: PrivateFabric, device: HybridDevice, firecracker: SimulatedFirecracker
    ) -> Iterator[list[socket.socket]]:
        """Yield the ends of a stream in each direction."""
        with (
            joined(fabric, device, firecracker) as (sock, guest),
            connected(fabric, firecracker) as (other, accepted),
        ):
            yield [sock, guest, other, accepted]

    @pytest.mark.parametrize("change", ["suspend", "migrate", "fault_tolerance", "power_off"])
    def test_interruptions_close_streams(
        self,
        fabric: PrivateFabric,
        device: HybridDevice,
        firecracker: SimulatedFirecracker,
        streams: list[socket.socket],
        change: str,
    ) -> None:
        call: Callable[..., object] = getattr(fabric.control, change)
        call(device.cid, *([True] if change == "fault_tolerance" else []))
        for sock in streams:
            assert sock.recv(1) == b""
        if change != "migrate":
            firecracker.wait_for()

    def test_streams_after_suspend_and_resume(
        self, fabric: PrivateFabric, device: HybridDevice, firecracker: SimulatedFirecracker
    ) -> None:
        with vsockets.create_server((2, 5008), context=fabric.host):
            firecracker.wait_for(5008)
            fabric.control.suspend(device.cid)
            firecracker.wait_for()
            with vsockets.create_server((2, 5009), context=fabric.host):
                fabric.control.resume(device.cid)
                firecracker.wait_for(5008, 5009)
        with joined(fabric, device, firecracker) as (sock, guest):
            exchange(sock, guest, b"x")

    def test_device_ends_after_its_context(
        self, fabric: PrivateFabric, firecracker: SimulatedFirecracker
    ) -> None:
        cid = fabric.control.add_context()["cid"]
        with (
            HybridDevice(fabric, firecracker.path, cid=cid) as device,
            vsockets.create_server((2, 5010), context=fabric.host),
        ):
            firecracker.wait_for(5010)
            fabric.control.remove_context(cid)
            assert device.process.wait(PATIENCE) == 0
            assert not firecracker.ports()

    def test_killed_device_leaves_guest_streams_and_removable_sockets(
        self, fabric: PrivateFabric, firecracker: SimulatedFirecracker
    ) -> None:
        cid = fabric.control.add_context()["cid"]
        with vsockets.create_server((2, 5011), context=fabric.host) as server:
            with HybridDevice(fabric, firecracker.path, cid=cid) as device:
                firecracker.wait_for(5011)
                with joined(fabric, device, firecracker) as (sock, guest):
                    other = firecracker.connects(5011)
                    accepted, _ = server.accept()
                    device.end(signal.SIGKILL)
                    assert sock.recv(1) == guest.recv(1) == b""
                    exchange(other, accepted, b"goes on")  # the device is not part of it
                    other.close()
                    accepted.close()
            with pytest.raises(ConnectionRefusedError):
                firecracker.connects(5011)  # a file without a socket
            with HybridDevice(fabric, firecracker.path, cid=cid):

                def connects() -> bool:
                    with contextlib.suppress(ConnectionRefusedError):
                        firecracker.connects(5011).close()
                        return True
                    return False

                wait_until(connects, "the port to be there again", PATIENCE)
        fabric.control.remove_context(cid)


def test_long_socket_paths(fabric: PrivateFabric, folder: Path) -> None:
    """flintlock#1226, vfkit#194: a unix socket's path has at most 107 bytes."""
    deep = folder / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    firecracker = SimulatedFirecracker(deep / "v.sock")
    firecracker.power_on()
    with (
        HybridDevice(fabric, firecracker.path) as device,
        joined(fabric, device, firecracker) as (sock, guest),
        connected(fabric, firecracker) as (other, accepted),
    ):
        exchange(sock, guest, b"there")
        exchange(other, accepted, b"and back")
    firecracker.close()


def test_read_line_leaves_the_rest() -> None:
    one, other = socket.socketpair()
    with one, other:
        one.sendall(b"a\nb")
        assert read_line(other) == b"a\n"
        assert other.recv(10) == b"b"
