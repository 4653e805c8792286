"""Split rings of hostile drivers: the device disables the ring, and nothing else."""

from __future__ import annotations

import contextlib
import os
import random
import select
from collections.abc import Callable
from typing import Any

import pytest

from support.virtio_driver import GUEST_BASE, DriverRing, Memory
from support.virtio_guest import SimulatedGuest, connect
from vsockets.devices.guest_memory import GuestMemory
from vsockets.devices.virtio.packet import HEADER_SIZE, Op
from vsockets.devices.virtio.ring import (
    DESCRIPTOR,
    F_VERSION_1,
    INDIRECT,
    NEXT,
    WRITE,
    Buffer,
    RingError,
    SplitRing,
    split_header,
)

from .conftest import Rig

SIZE = 16

#: These tests break a split ring.
split = pytest.mark.parametrize("rig", [0], ids=["split"], indirect=True)


class Bench:
    """A ring with a driver at one side and the device's code at the other."""

    def __init__(self, regions: int = 1) -> None:
        self.memory = Memory(1 << 20, regions)
        self.driver = DriverRing(self.memory, SIZE)
        self.guest = GuestMemory()
        for address, size, _, offset in self.memory.regions:
            self.guest.map(address, size, True, self.memory.fd, offset)
        parts = (self.driver.descriptors, self.driver.available, self.driver.used)
        a, b, c = (GUEST_BASE + offset for offset in parts)
        self.addresses = a, b, c
        self.ring = SplitRing(self.guest, SIZE, self.addresses, 0, True)
        self.place = self.memory.allocate(4096)

    def descriptor(self, index: int, length: int, flags: int, following: int = 0) -> None:
        self.driver.write_descriptor(index, GUEST_BASE + self.place, length, flags, following)

    def make_available(self, head: int) -> None:
        self.driver.make_available(head)
        self.driver.publish()


def loop(bench: Bench) -> None:
    bench.descriptor(0, 10, NEXT, 1)
    bench.descriptor(1, 10, NEXT, 0)


def loop_of_nothing(bench: Bench) -> None:
    bench.descriptor(0, 0, NEXT, 0)


def outside(bench: Bench) -> None:
    bench.driver.write_descriptor(0, 0x10, 10, 0, 0)


def at_the_edge(bench: Bench) -> None:
    end = GUEST_BASE + bench.memory.size
    bench.driver.write_descriptor(0, end - 9, 10, 0, 0)


def four_gigabytes(bench: Bench) -> None:
    bench.descriptor(0, 0xFFFF_FFFF, 0)


def wraps_around(bench: Bench) -> None:
    bench.driver.write_descriptor(0, 0xFFFF_FFFF_FFFF_FFF0, 0x20, 0, 0)


def next_outside(bench: Bench) -> None:
    bench.descriptor(0, 10, NEXT, SIZE)


def readable_after_writable(bench: Bench) -> None:
    bench.descriptor(0, 10, NEXT | WRITE, 1)
    bench.descriptor(1, 10, 0)


def indirect(length: int, first: bytes = b"", flags: int = INDIRECT) -> Callable[[Bench], None]:
    def write(bench: Bench) -> None:
        bench.descriptor(0, length, flags)
        bench.memory.view[bench.place : bench.place + len(first)] = first

    return write


def table_outside(bench: Bench) -> None:
    bench.driver.write_descriptor(0, 0x10, 32, INDIRECT, 0)


INDIRECT_TWICE = DESCRIPTOR.pack(GUEST_BASE, 16, INDIRECT, 0)
INDIRECT_LOOP = DESCRIPTOR.pack(GUEST_BASE, 16, NEXT, 0)
INDIRECT_FAR = DESCRIPTOR.pack(GUEST_BASE, 16, NEXT, 1)

BROKEN = {
    "a chain that loops": loop,
    "a chain of nothing that loops": loop_of_nothing,
    "outside memory": outside,
    "across its edge": at_the_edge,
    "4 GB long": four_gigabytes,
    "beyond 64 bits": wraps_around,
    "next outside the table": next_outside,
    "to be read after one to be written": readable_after_writable,
    "an empty table": indirect(0),
    "a torn table": indirect(17),
    "a huge table": indirect(1 << 20),
    "a table with more after it": indirect(16, flags=INDIRECT | NEXT),
    "a table outside memory": table_outside,
    "a table in a table": indirect(16, INDIRECT_TWICE),
    "a table that loops": indirect(16, INDIRECT_LOOP),
    "next outside an indirect table": indirect(16, INDIRECT_FAR),
}


@pytest.mark.parametrize("name", BROKEN)
def test_invalid_chains_are_detected(name: str) -> None:
    bench = Bench()
    BROKEN[name](bench)
    bench.make_available(0)
    with pytest.raises(RingError):
        bench.ring.pop()


@pytest.mark.parametrize("head", [SIZE, 0xFFFF])
def test_head_outside_the_table_is_detected(head: int) -> None:
    bench = Bench()
    bench.make_available(head)
    with pytest.raises(RingError):
        bench.ring.pop()


@pytest.mark.parametrize("index", [SIZE + 1, 0x8000, 0xFFFF])
def test_index_that_runs_ahead_is_detected(index: int) -> None:
    bench = Bench()
    bench.driver.next = index
    bench.driver.publish()
    with pytest.raises(RingError):
        bench.ring.pop()


def test_chain_is_read_once() -> None:
    """The device uses the values that it checked (CVE-2025-22224)."""
    bench = Bench()
    bench.descriptor(0, 10, 0)
    bench.make_available(0)
    chain = bench.ring.pop()
    assert chain is not None
    four_gigabytes(bench)
    assert [len(part) for part in chain[1]] == [10]


def test_empty_descriptors_are_skipped() -> None:
    bench = Bench()
    bench.descriptor(0, 0, NEXT, 1)
    bench.descriptor(1, 5, 0)
    bench.make_available(0)
    chain = bench.ring.pop()
    assert chain is not None and [len(part) for part in chain[1]] == [5]


@pytest.mark.parametrize("size", [3, 15, 17])
def test_size_must_be_a_power_of_two(size: int) -> None:
    bench = Bench()
    with pytest.raises(RingError):
        SplitRing(bench.guest, size, bench.addresses, 0, True)


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("wrong", [1, 1 << 40, (1 << 20) - 8])
def test_unmapped_or_misaligned_parts_are_refused(part: int, wrong: int) -> None:
    bench = Bench()
    addresses = list(bench.addresses)
    addresses[part] = GUEST_BASE + wrong
    with pytest.raises(RingError):
        SplitRing(bench.guest, SIZE, (addresses[0], addresses[1], addresses[2]), 0, True)


def test_indices_wrap() -> None:
    bench = Bench()
    for turn in range(70_000 // SIZE + 1):
        for _ in range(SIZE):
            bench.driver.add([(bench.place, 8)], writable=False)
        bench.driver.publish()
        for _ in range(SIZE):
            chain = bench.ring.pop()
            assert chain is not None
            bench.ring.push(chain[0], 0)
        assert bench.ring.pop() is None
        assert bench.ring.publish() or turn == 0
        bench.driver.collect()
        bench.driver.enable_notification()
    assert bench.ring.base == (70_000 // SIZE + 1) * SIZE & 0xFFFF


def test_buffers_are_those_of_single_chains() -> None:
    """Buffers popped together are those that the ring returns one by one, or both ways fail."""
    random_, ends = random.Random(1), [0, 0]
    for _ in range(1500):
        bench = Bench(random_.choice((1, 2)))
        other = SplitRing(bench.guest, SIZE, bench.addresses, 0, True)
        bench.memory.view[bench.place : bench.place + 4096] = os.urandom(4096)
        for index in range(SIZE):
            random_descriptor(bench, random_, index)
        count = random_.randrange(1, SIZE + 1)
        for _ in range(count):
            bench.driver.make_available(random_.randrange(SIZE + (random_.random() < 0.01)))
        bench.driver.publish()
        found: list[list[tuple[object, ...]]] = [[], []]
        try:
            while len(found[0]) < count:
                wanted = random_.randrange(1, SIZE)
                buffers = bench.ring.pop_buffers(wanted, HEADER_SIZE)
                assert len(buffers) == min(wanted, count - len(found[0]))
                found[0] += map(contents, buffers)
            assert not bench.ring.pop_buffers(1, HEADER_SIZE) and bench.ring.pop() is None
        except RingError:
            ends[0] += 1
        try:
            while (chain := other.pop()) is not None:
                found[1].append(contents(split_header(chain, HEADER_SIZE)))
        except RingError:
            ends[1] += 1
            found[1] = found[1][: len(found[0])]  # of a failed batch nothing is returned
        assert found[0] == found[1] and ends[0] == ends[1]
        bench.driver.close()
        bench.memory.close()
    assert 150 < ends[0] < 1350


def random_descriptor(bench: Bench, random_: random.Random, index: int) -> None:
    """Write a buffer as Linux does, with up to one field changed."""
    lengths = [HEADER_SIZE, random_.randrange(1, 3000)]
    flags = [WRITE | NEXT, WRITE]
    table = bench.place + 4096 + 64 * index
    wrong = random_.random() < 0.02
    if wrong:
        which = random_.randrange(2)
        lengths[which] = random_.choice((0, 1, HEADER_SIZE - 1, HEADER_SIZE + 1, 1 << 31))
        flags[random_.randrange(2)] = random_.choice((0, NEXT, WRITE, WRITE | NEXT, INDIRECT))
    places = [GUEST_BASE + bench.place + random_.randrange(1000) for _ in range(2)]
    if random_.random() < 0.005:
        places[random_.randrange(2)] = random_.choice((0, GUEST_BASE - 1, (1 << 64) - 100))
    if random_.random() < 0.5:
        length = sum(lengths) if not wrong else lengths[0]
        bench.driver.write_descriptor(index, places[0], length, flags[1] if wrong else WRITE, 0)
        return
    following = random_.choice((0, 1, 2, 0xFFFF)) if random_.random() < 0.01 else 1
    DESCRIPTOR.pack_into(bench.memory.view, table, places[0], lengths[0], flags[0], following)
    DESCRIPTOR.pack_into(bench.memory.view, table + 16, places[1], lengths[1], flags[1], 0)
    size = random_.choice((0, 16, 31, 48)) if random_.random() < 0.01 else 32
    bench.driver.write_descriptor(index, GUEST_BASE + table, size, INDIRECT, 0)


def contents(buffer: Buffer) -> tuple[object, ...]:
    head, header, parts, room = buffer
    first = None if header is None else bytes(header[:HEADER_SIZE])
    return head, first, [bytes(part) for part in parts], room


def test_buffer_is_read_once() -> None:
    bench = Bench()
    bench.descriptor(0, 100, WRITE)
    bench.make_available(0)
    ((head, header, parts, room),) = bench.ring.pop_buffers(9, HEADER_SIZE)
    four_gigabytes(bench)
    bench.driver.make_available(5)
    assert (head, room) == (0, 100 - HEADER_SIZE)
    assert header is not None and len(header) >= HEADER_SIZE and len(parts[0]) == room
    bench.ring.push_all([(head, 60)])
    assert bench.ring.publish() and bench.driver.elements[0] == 60 << 32


@pytest.mark.parametrize("index", [SIZE + 1, 0x8000, 0xFFFF])
def test_index_of_buffers_that_runs_ahead_is_detected(index: int) -> None:
    bench = Bench()
    bench.driver.next = index
    bench.driver.publish()
    with pytest.raises(RingError, match="index jumps"):
        bench.ring.pop_buffers(4, HEADER_SIZE)


# The device as a whole


def add(ring: Any, place: int, size: int, writable: bool) -> None:
    ring.add([(place, size)], writable)
    ring.publish()


def breaks(rig: Rig, guest: SimulatedGuest, index: int, spoil: Callable[[Any], None]) -> None:
    """Assert that ``spoil`` disables the ring and resets connections, and harms no other guest."""
    rig.host.open_ports.add(5000)
    connect(guest, 1024, (2, 5000))
    sock = rig.host.accepted[-1]
    ring = guest.rings[index]
    spoil(ring)
    os.eventfd_write(ring.kick, 1)
    with contextlib.suppress(BrokenPipeError):  # the device may have noticed already
        sock.send(b"something for the guest")
    assert select.select([ring.error], [], [], 10)[0], "the front end is told"
    with contextlib.suppress(ConnectionResetError):  # reset because of unread data
        assert sock.recv(1) == b""
    guest.front_end.close()
    connect(rig.guest(), 1024, (2, 5000)).send(b"x")
    assert rig.host.accepted[-1].recv(9) == b"x"


@split
def test_broken_transmit_queue_is_disabled(rig: Rig) -> None:
    def spoil(ring: DriverRing) -> None:
        ring.write_descriptor(0, 0x10, 10, 0, 0)
        ring.make_available(0)
        ring.publish()

    breaks(rig, rig.guest(features=F_VERSION_1), 1, spoil)


@pytest.mark.parametrize("size", [1, 43])
def test_receive_buffers_without_room_for_a_header(rig: Rig, size: int) -> None:
    guest = rig.guest(features=F_VERSION_1, refill=False)
    place = guest.memory.allocate(100)
    guest.places[guest.receive.add([(place, 100)], writable=True)] = place
    guest.receive.publish()
    breaks(rig, guest, 0, lambda ring: add(ring, place, size, True))


def test_readable_receive_buffers_disable_the_ring(rig: Rig) -> None:
    guest = rig.guest(features=F_VERSION_1, refill=False)
    place = guest.memory.allocate(100)
    guest.places[guest.receive.add([(place, 100)], writable=True)] = place
    guest.receive.publish()
    breaks(rig, guest, 0, lambda ring: add(ring, place, 99, False))


@split
@pytest.mark.parametrize("length", [0, 43])
def test_packet_without_a_complete_header_disables_the_ring(rig: Rig, length: int) -> None:
    guest = rig.guest(features=F_VERSION_1)

    def spoil(ring: DriverRing) -> None:
        ring.write_descriptor(0, GUEST_BASE + 4096, length, 0, 0)
        ring.make_available(0)
        ring.publish()

    breaks(rig, guest, 1, spoil)


def test_header_with_too_large_a_length_resets(rig: Rig) -> None:
    rig.host.open_ports.add(5000)
    guest = rig.guest()
    stream = connect(guest, 1024, (2, 5000))
    guest.send(stream.packet(Op.RW, 100), b"less")
    assert guest.next_packet()[0].op == Op.RST


def test_bytes_beyond_the_headers_length_are_ignored(rig: Rig) -> None:
    rig.host.open_ports.add(5000)
    guest = rig.guest()
    stream = connect(guest, 1024, (2, 5000))
    guest.send(stream.packet(Op.RW, 4), b"more than 4")
    assert rig.host.accepted[-1].recv(99) == b"more"
