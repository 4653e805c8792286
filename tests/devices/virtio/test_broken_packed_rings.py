"""Packed rings of hostile drivers, and of a correct driver across the wrap."""

from __future__ import annotations

import os
import random
import select
from collections.abc import Callable

import pytest

from support.packed_driver import PackedDriverRing
from support.virtio_driver import GUEST_BASE, Memory
from support.virtio_guest import connect
from vsockets.devices.guest_memory import GuestMemory
from vsockets.devices.virtio.packed_ring import PackedRing
from vsockets.devices.virtio.ring import (
    DESCRIPTOR,
    F_RING_PACKED,
    F_VERSION_1,
    INDIRECT,
    NEXT,
    WRITE,
    RingError,
)

from .conftest import Rig

SIZE = 5
AVAILABLE = 1 << 7


class Bench:
    """A ring with a driver at one side and the device's code at the other."""

    def __init__(self, size: int = SIZE) -> None:
        self.memory = Memory(1 << 20)
        self.driver = PackedDriverRing(self.memory, size)
        self.guest = GuestMemory()
        for address, length, _, offset in self.memory.regions:
            self.guest.map(address, length, True, self.memory.fd, offset)
        parts = (self.driver.descriptors, self.driver.available, self.driver.used)
        a, b, c = (GUEST_BASE + offset for offset in parts)
        self.addresses = a, b, c
        self.ring = PackedRing(self.guest, size, self.addresses, self.driver.base, True)
        self.place = self.memory.allocate(4096)

    def descriptor(self, index: int, length: int, flags: int, address: int | None = None) -> None:
        where = GUEST_BASE + self.place if address is None else address
        self.driver.write_descriptor(index, where, length, flags | AVAILABLE, 77)


def endless(bench: Bench) -> None:
    for index in range(SIZE):
        bench.descriptor(index, 10, NEXT)


def outside(bench: Bench) -> None:
    bench.descriptor(0, 10, 0, 0x10)


def four_gigabytes(bench: Bench) -> None:
    bench.descriptor(0, 0xFFFF_FFFF, 0)


def wraps_around(bench: Bench) -> None:
    bench.descriptor(0, 0x20, 0, 0xFFFF_FFFF_FFFF_FFF0)


def readable_after_writable(bench: Bench) -> None:
    bench.descriptor(0, 10, NEXT | WRITE)
    bench.descriptor(1, 10, 0)


def table_in_a_chain(bench: Bench) -> None:
    bench.descriptor(0, 10, NEXT)
    bench.descriptor(1, 16, INDIRECT)


def indirect(length: int, entry: bytes = b"", flags: int = INDIRECT) -> Callable[[Bench], None]:
    def write(bench: Bench) -> None:
        bench.descriptor(0, length, flags)
        bench.memory.view[bench.place : bench.place + len(entry)] = entry

    return write


BROKEN = {
    "a chain round the whole ring": endless,
    "outside memory": outside,
    "4 GB long": four_gigabytes,
    "beyond 64 bits": wraps_around,
    "to be read after one to be written": readable_after_writable,
    "a table in a chain": table_in_a_chain,
    "an empty table": indirect(0),
    "a torn table": indirect(17),
    "a huge table": indirect(1 << 20),
    "a table with more after it": indirect(16, flags=INDIRECT | NEXT),
    "a table's part outside memory": indirect(16, DESCRIPTOR.pack(0x10, 16, 0, 0)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_invalid_chains_are_detected(name: str) -> None:
    bench = Bench()
    BROKEN[name](bench)
    with pytest.raises(RingError):
        bench.ring.pop()


def test_flags_in_an_indirect_table_are_ignored() -> None:
    """In a packed ring's table only WRITE has a meaning (virtio 1.3, 2.8.7)."""
    bench = Bench()
    entry = DESCRIPTOR.pack(GUEST_BASE + bench.place, 16, 0, INDIRECT | NEXT)
    indirect(16, entry)(bench)
    chain = bench.ring.pop()
    assert chain is not None and [len(part) for part in chain[1]] == [16]


def test_chain_is_read_once() -> None:
    """The device uses the values that it checked (CVE-2025-22224)."""
    bench = Bench()
    bench.descriptor(0, 10, 0)
    chain = bench.ring.pop()
    assert chain is not None
    four_gigabytes(bench)
    assert [len(part) for part in chain[1]] == [10]


@pytest.mark.parametrize("base", [SIZE, 0x7FFF])
def test_base_outside_the_ring_is_refused(base: int) -> None:
    bench = Bench()
    with pytest.raises(RingError):
        PackedRing(bench.guest, SIZE, bench.addresses, base << 16, True)


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("wrong", [1, 1 << 40, (1 << 20) - 2])
def test_unmapped_or_misaligned_parts_are_refused(part: int, wrong: int) -> None:
    bench = Bench()
    addresses = list(bench.addresses)
    addresses[part] = GUEST_BASE + wrong
    with pytest.raises(RingError):
        PackedRing(bench.guest, SIZE, (addresses[0], addresses[1], addresses[2]), 1 << 31, True)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_chains_of_every_length_across_the_wrap(size: int) -> None:
    """Chains of every length, across the ring's end, returned with notifications."""
    bench, random_ = Bench(size), random.Random(size)
    driver, ring = bench.driver, bench.ring
    told = 0
    for number in range(500):
        parts = random_.randint(1, size)
        assert driver.has_room(parts)
        id = driver.add([(bench.place + part, 1 + part) for part in range(parts)], writable=True)
        driver.publish()
        chain = ring.pop()
        assert chain is not None
        assert [len(part) for part in chain[2]] == [1 + part for part in range(parts)]
        assert ring.pop() is None and not ring.enable_notification()
        ring.push(chain[0], number)
        told += ring.publish()
        assert driver.collect() == [(id, number)]
        assert ring.base == driver.base
        if number % 7 == 0:
            assert not driver.enable_notification()
    assert 0 < told < 500


@pytest.mark.parametrize("rig", [F_RING_PACKED], ids=["packed"], indirect=True)
def test_device_disables_a_broken_ring(rig: Rig) -> None:
    guest = rig.guest(features=F_VERSION_1)
    assert guest.features & F_RING_PACKED
    rig.host.open_ports.add(5000)
    connect(guest, 1024, (2, 5000))
    ring = guest.transmit
    index = ring.next % ring.size
    ring.write_descriptor(index, 0x10, 10, AVAILABLE, 0)
    os.eventfd_write(ring.kick, 1)
    assert select.select([ring.error], [], [], 10)[0], "the front end is told"
    assert rig.host.accepted[-1].recv(1) == b""
