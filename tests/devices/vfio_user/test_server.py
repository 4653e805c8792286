"""The vfio-user server, over a real socket, with a device that records its calls."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockets.devices.guest_memory import GuestMemory
from vsockets.devices.limits import VFIO_USER_DESCRIPTORS_MAX
from vsockets.devices.loop import DeviceLoop
from vsockets.devices.unix_server import DeviceProtocolError
from vsockets.devices.vfio_user import (
    ConfigSpace,
    Identity,
    Interrupts,
    Irq,
    MappedArea,
    Region,
    VfioUserServer,
    pci,
)
from vsockets.devices.vfio_user.messages import (
    ACCESS,
    DMA_MAP,
    DMA_UNMAP,
    HEADER,
    MAPPED_AREA,
    REGION_INFO,
    SET_IRQS,
    Command,
    Decoder,
    Message,
)
from vsockets.testing import wait_until

PAGE = 4096
VERSION = struct.pack("<HH", 0, 0) + b'{"capabilities":{}}\0'


class RecordingDevice:
    """A device with a region of 64 bytes."""

    def __init__(self) -> None:
        self.regions: Mapping[Region, int] = {Region.BAR1: 64, Region.CONFIG: 256}
        self.mapped: Mapping[Region, MappedArea] = {}
        self.memory = GuestMemory()
        self.interrupts = Interrupts({Irq.INTX: 1, Irq.MSIX: 3})
        self.config = ConfigSpace(Identity(1, 2, 3, 4, 5, 6), [pci.msix(3, 1, 0, 32), pci.msi()])
        self.bytes = bytearray(64)
        self.resets = 0
        self.forgotten: list[tuple[int, int]] = []

    def read(self, region: int, offset: int, count: int) -> bytes:
        if region == Region.CONFIG:
            return self.config.read(offset, count)
        return bytes(self.bytes[offset : offset + count])

    def write(self, region: int, offset: int, data: bytes, posted: bool) -> None:
        if region == Region.CONFIG:
            self.config.write(offset, data)
        else:
            self.bytes[offset : offset + len(data)] = data

    def reset(self) -> None:
        self.resets += 1
        self.config.reset()

    def on_disconnect(self) -> None:
        self.reset()

    def release_memory(self, address: int, size: int) -> None:
        self.forgotten.append((address, size))


class Client:
    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(os.fspath(path))

    def send(
        self, command: int, payload: bytes = b"", fds: tuple[int, ...] = (), flags: int = 0
    ) -> None:
        header = HEADER.pack(7, command, HEADER.size + len(payload), flags, 0)
        socket.send_fds(self.sock, [header + payload], fds)

    def request(self, command: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> bytes | int:
        """Return the reply's payload, or its errno."""
        self.send(command, payload, fds)
        return self.receive_reply()

    def receive_reply(self) -> bytes | int:
        header = self.sock.recv(HEADER.size, socket.MSG_WAITALL)
        number, _, size, flags, code = HEADER.unpack(header)
        assert number == 7 and flags & 1
        payload = (
            self.sock.recv(size - HEADER.size, socket.MSG_WAITALL) if size > HEADER.size else b""
        )
        return int(code) if flags & 0x20 else payload


@pytest.fixture
def device() -> RecordingDevice:
    return RecordingDevice()


@pytest.fixture
def path(device: RecordingDevice, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "vfio"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    listener.bind(os.fspath(path))
    listener.listen()
    loop = DeviceLoop()
    server = VfioUserServer(loop, listener, device)
    thread = threading.Thread(target=loop.run)
    loop_wakes, ours = socket.socketpair()
    loop.watch(loop_wakes.fileno(), lambda events: loop.stop())
    thread.start()
    yield path
    ours.send(b"x")
    thread.join()
    server.close()
    ours.close()
    loop_wakes.close()
    loop.close()


@pytest.fixture
def client(path: Path) -> Iterator[Client]:
    client = Client(path)
    client.request(Command.VERSION, VERSION)
    yield client
    client.sock.close()


class TestMappedArea:
    INDEX = Region.BAR1

    def test_client_shares_the_memory(self, device: RecordingDevice, client: Client) -> None:
        area = MappedArea(PAGE, 12)
        device.mapped = {self.INDEX: area}
        # As QEMU does: first a request with room for a region without capabilities.
        reply = client.request(
            Command.DEVICE_GET_REGION_INFO, REGION_INFO.pack(32, 0, self.INDEX, 0, 0, 0)
        )
        assert isinstance(reply, bytes)
        room, _, _, capability_at, *_ = REGION_INFO.unpack(reply)
        assert capability_at == 32  # QEMU 11.1 refuses 0 in a short reply, too
        client.send(Command.DEVICE_GET_REGION_INFO, REGION_INFO.pack(room, 0, self.INDEX, 0, 0, 0))
        reply, fds, _, _ = socket.recv_fds(client.sock, 4096, 1)
        reply = reply[HEADER.size :]
        mappable = 15
        assert REGION_INFO.unpack_from(reply) == (len(reply), mappable, self.INDEX, 32, 64, 0)
        assert MAPPED_AREA.unpack_from(reply, 32) == (1, 1, 0, 1, 0, PAGE, 12)
        with pytest.raises(PermissionError):
            os.ftruncate(fds[0], 0)
        with mmap.mmap(fds[0], 12, offset=PAGE) as memory:
            os.close(fds[0])
            memory[11] = 7
            assert area.view[11] == 7
            area.view[0] = 8
            assert memory[0] == 8

    def test_other_regions_have_none(self, device: RecordingDevice, client: Client) -> None:
        device.mapped = {self.INDEX: MappedArea(PAGE, 12)}
        info = REGION_INFO.pack(100, 0, Region.CONFIG, 0, 0, 0)
        reply = client.request(Command.DEVICE_GET_REGION_INFO, info)
        assert reply == REGION_INFO.pack(32, 3, Region.CONFIG, 0, 256, 0)


def access(region: int, offset: int, count: int, data: bytes = b"") -> bytes:
    return ACCESS.pack(offset, region, count) + data


def test_version_negotiation(path: Path) -> None:
    client = Client(path)
    answer = client.request(Command.VERSION, VERSION)
    assert isinstance(answer, bytes) and answer[:4] == bytes(4)
    assert "max_msg_fds" in json.loads(answer[4:-1])["capabilities"]
    client.sock.close()


@pytest.mark.parametrize(
    "payload",
    [b"", b"\0", b"\1\0\0\0", VERSION[:4] + b"[]", VERSION[:4] + b"{", VERSION[:4] + b"\xff"],
)
def test_invalid_versions_are_refused(path: Path, payload: bytes) -> None:
    client = Client(path)
    assert client.request(Command.VERSION, payload) == errno.EINVAL
    client.sock.close()


def test_device_region_and_interrupt_information(client: Client) -> None:
    assert client.request(
        Command.DEVICE_GET_INFO, struct.pack("<IIII", 16, 0, 0, 0)
    ) == struct.pack("<IIII", 16, 3, 9, 5)
    for index, size in [(1, 64), (7, 256), (0, 0), (8, 0)]:
        answer = client.request(
            Command.DEVICE_GET_REGION_INFO, struct.pack("<IIIIQQ", 32, 0, index, 0, 0, 0)
        )
        assert answer == struct.pack("<IIIIQQ", 32, 3 if size else 0, index, 0, size, 0)
    assert (
        client.request(Command.DEVICE_GET_REGION_INFO, struct.pack("<IIIIQQ", 32, 0, 9, 0, 0, 0))
        == errno.EINVAL
    )
    for index, flags, count in [(0, 7, 1), (1, 1, 0), (2, 9, 3), (4, 1, 0)]:
        answer = client.request(Command.DEVICE_GET_IRQ_INFO, struct.pack("<IIII", 16, 0, index, 0))
        assert answer == struct.pack("<IIII", 16, flags, index, count)
    for index in (Irq.ERR, 5):
        question = struct.pack("<IIII", 16, 0, index, 0)
        assert client.request(Command.DEVICE_GET_IRQ_INFO, question) == errno.EINVAL
    header = client.request(Command.REGION_READ, access(Region.CONFIG, 0, 64))
    assert isinstance(header, bytes)
    assert header[16:20] == struct.pack("<HH", 1, 2)
    assert header[16 + 0x34] == 0x40


def test_region_reads_and_writes(client: Client, device: RecordingDevice) -> None:
    assert client.request(Command.REGION_WRITE, access(1, 60, 4, b"abcd")) == access(1, 60, 4)
    assert client.request(Command.REGION_READ, access(1, 60, 4)) == access(1, 60, 4, b"abcd")
    client.send(Command.REGION_WRITE, access(1, 0, 1, b"x"), flags=0x10)  # no reply
    assert client.request(Command.REGION_READ, access(1, 0, 1)) == access(1, 0, 1, b"x")
    for region, offset, count in [(1, 61, 4), (1, 2**64 - 1, 4), (2, 0, 1), (99, 0, 1), (1, 0, 0)]:
        assert client.request(Command.REGION_READ, access(region, offset, count)) == errno.EINVAL
    assert client.request(Command.REGION_WRITE, access(1, 0, 4, b"abc")) == errno.EINVAL
    assert client.request(Command.REGION_READ, b"short") == errno.EINVAL


def test_dma_map_and_unmap(client: Client, device: RecordingDevice) -> None:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 4 * PAGE)
    os.pwrite(fd, b"from the guest", PAGE)
    # As QEMU does: several at once, some without a file; the descriptor is that of the last one.
    parts = b""
    for address, has_file in [(8 * PAGE, False), (0, True)]:
        payload = DMA_MAP.pack(32, 3, PAGE if has_file else 0, address, PAGE)
        parts += HEADER.pack(7, Command.DMA_MAP, HEADER.size + len(payload), 0, 0) + payload
    socket.send_fds(client.sock, [parts], [fd])
    assert client.receive_reply() == client.receive_reply() == b""
    assert bytes(device.memory.view(0, 14)) == b"from the guest"
    again = DMA_MAP.pack(32, 3, 0, 0, PAGE)
    assert client.request(Command.DMA_MAP, again, (fd,)) == errno.EEXIST
    long = DMA_MAP.pack(32, 3, 0, 16 * PAGE, 5 * PAGE)
    assert client.request(Command.DMA_MAP, long, (fd,)) == errno.EINVAL
    unmap = DMA_UNMAP.pack(24, 0, 0, PAGE)
    assert client.request(Command.DMA_UNMAP, unmap) == unmap
    assert device.forgotten == [(0, PAGE)]
    assert client.request(Command.DMA_UNMAP, unmap) == errno.EINVAL
    os.close(fd)


def test_interrupts_signal_eventfds(client: Client, device: RecordingDevice) -> None:
    eventfds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
    device.interrupts.trigger(0)  # no eventfd
    assert (
        client.request(Command.DEVICE_SET_IRQS, SET_IRQS.pack(20, 0x24, 2, 0, 3), tuple(eventfds))
        == b""
    )
    device.interrupts.trigger(2)
    assert [_count(eventfd) for eventfd in eventfds] == [0, 0, 1]
    assert client.request(Command.DEVICE_SET_IRQS, SET_IRQS.pack(20, 0x21, 2, 0, 0)) == b""
    device.interrupts.trigger(2)
    assert (
        client.request(Command.DEVICE_SET_IRQS, SET_IRQS.pack(20, 0x24, 2, 0, 1), (eventfds[0],))
        == b""
    )
    device.interrupts.trigger(2)  # one eventfd for all
    assert [_count(eventfd) for eventfd in eventfds] == [1, 0, 0]
    # A request that fails changes nothing.
    assert client.request(Command.DEVICE_SET_IRQS, SET_IRQS.pack(20, 0x24, 1, 0, 1), (eventfds[1],))
    device.interrupts.trigger(0)
    assert [_count(eventfd) for eventfd in eventfds] == [1, 0, 0]
    for fields in [(0x24, 2, 3, 1), (0x24, 2, 2**32 - 1, 2), (0x24, 9, 0, 1), (0x22, 2, 0, 1)]:
        given = (eventfds[0],)
        answer = client.request(Command.DEVICE_SET_IRQS, SET_IRQS.pack(20, *fields), given)
        assert answer == errno.EINVAL
    for eventfd in eventfds:
        os.close(eventfd)


def test_clients_are_served_one_after_another(path: Path, device: RecordingDevice) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(1, 4):
        client = Client(path)
        client.request(Command.VERSION, VERSION)
        assert client.request(Command.DEVICE_RESET) == b""
        fd = os.memfd_create("guest")
        os.ftruncate(fd, PAGE)
        assert client.request(Command.DMA_MAP, DMA_MAP.pack(32, 3, 0, 0, PAGE), (fd,)) == b""
        os.close(fd)
        client.sock.close()
        assert device.resets >= 2 * number - 1
    client = Client(path)
    client.request(Command.VERSION, VERSION)
    assert device.resets == 6 and len(device.memory) == 0
    client.sock.close()
    assert len(os.listdir("/proc/self/fd")) <= before + 1


@pytest.mark.parametrize(
    "garbage",
    [
        bytes(16),
        HEADER.pack(1, Command.VERSION, 15, 0, 0),
        HEADER.pack(1, Command.VERSION, 2**32 - 1, 0, 0),
        HEADER.pack(1, Command.VERSION, 16, 1, 0),
        HEADER.pack(1, Command.DEVICE_RESET, 16, 0, 0),  # before VERSION
        HEADER.pack(1, Command.VERSION, 16 + len(VERSION), 0, 0) + VERSION + bytes(16),
    ],
)
def test_malformed_message_ends_only_its_connection(path: Path, garbage: bytes) -> None:
    client = Client(path)
    client.sock.send(garbage)
    while client.sock.recv(4096):
        pass
    client.sock.close()
    client = Client(path)
    assert isinstance(client.request(Command.VERSION, VERSION), bytes)
    assert client.request(99) == errno.ENOTSUP
    client.sock.close()


@pytest.mark.parametrize(
    "messages",
    [
        [bytes(16)],  # invalid size
        [HEADER.pack(1, Command.VERSION, 16, 1, 0)],  # a reply
        [HEADER.pack(1, Command.DMA_MAP, 16, 0, 0)],  # before VERSION
        [HEADER.pack(1, 99, 16, 0, 0)],
        [b"\1"],  # incomplete
        [b"\1", b"\1"],  # more than one message may have
    ],
)
def test_descriptors_of_a_refused_message_are_closed(path: Path, messages: list[bytes]) -> None:
    before = _descriptors()
    for _ in range(3):
        client = Client(path)
        for message in messages:
            socket.send_fds(
                client.sock, [message], [client.sock.fileno()] * VFIO_USER_DESCRIPTORS_MAX
            )
        client.sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while client.sock.recv(4096):
                pass
        client.sock.close()
    wait_until(lambda: _descriptors() <= before, "the descriptors to be closed")


@pytest.mark.parametrize("command", [Command.REGION_READ, Command.DMA_MAP, Command.DEVICE_SET_IRQS])
def test_descriptors_before_version_are_closed_once(path: Path, command: Command) -> None:
    """The connection ends: a second close of the same number would be refused with EBADF."""
    client = Client(path)
    header = HEADER.pack(1, command, HEADER.size, 0, 0)
    socket.send_fds(client.sock, [header], [client.sock.fileno()])
    assert client.sock.recv(4096) == b""
    client.sock.close()


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@given(
    st.lists(st.tuples(st.integers(1, 13), st.binary(max_size=40)), max_size=8),
    st.lists(st.integers(1, 30), max_size=40),
)
def test_decoding_is_independent_of_read_sizes(
    messages: list[tuple[int, bytes]], cuts: list[int]
) -> None:
    data = b"".join(
        HEADER.pack(number, command, HEADER.size + len(payload), 0, 0) + payload
        for number, (command, payload) in enumerate(messages)
    )
    decoder, found, at = Decoder(), list[Message](), 0
    for cut in [*cuts, len(data)]:
        found += decoder.receive(data[at : at + cut])
        at += cut
    assert [(one.command, one.payload) for one in found] == messages


@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    with contextlib.suppress(DeviceProtocolError):
        list(Decoder().receive(data))


def _count(eventfd: int) -> int:
    try:
        return os.eventfd_read(eventfd)
    except BlockingIOError:
        return 0
