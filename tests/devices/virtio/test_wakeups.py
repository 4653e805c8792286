"""Lost wake-ups: driver and device, at every interleaving of their accesses to a ring.

Either side sleeps only after it has requested a wake-up and checked once more.  Here both run,
each in a thread, one at a time; after each access to the ring's memory the other may continue,
where Hypothesis decides so.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.packed_driver import PackedDriverRing
from support.virtio_driver import GUEST_BASE, DriverRing, Memory
from vsockets.devices.capture import CaptureSink
from vsockets.devices.guest_memory import GuestMemory
from vsockets.devices.loop import DeviceLoop
from vsockets.devices.virtio.connection import VirtioConnection
from vsockets.devices.virtio.packed_ring import PackedRing
from vsockets.devices.virtio.packet import HEADER_SIZE, Header, Op
from vsockets.devices.virtio.ring import SplitRing
from vsockets.devices.virtio.tx import KickCoalescing, TransmitQueue

Driver = DriverRing | PackedDriverRing
Ring = SplitRing | PackedRing

CID = 5
SIZE = 4
PACKETS = 12

#: No capture runs.
UNTAPPED = CaptureSink(DeviceLoop())

#: Number of accesses that a side makes before the other continues.
schedules = st.lists(st.integers(1, 12), max_size=60)


class LostWakeUpError(AssertionError):
    """Both sides sleep, and neither was notified."""


class Stage:
    """Two threads that take turns."""

    def __init__(self, schedule: list[int]) -> None:
        self._lengths: Iterator[int] = iter(schedule)
        self._left = next(self._lengths, 0)
        self._turns = threading.Semaphore(0), threading.Semaphore(0)
        self._done = [False, False]
        self._waits = [False, False]
        self._who = threading.local()
        self._failure: BaseException | None = None

    def play(self, *parts: Callable[[], None]) -> None:
        threads = [
            threading.Thread(target=self._run, args=(number, part), daemon=True)
            for number, part in enumerate(parts)
        ]
        for thread in threads:
            thread.start()
        self._turns[0].release()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        if self._failure is not None:
            raise self._failure

    def _run(self, number: int, part: Callable[[], None]) -> None:
        self._who.number = number
        self._turns[number].acquire()
        try:
            part()
        except BaseException as error:
            self._failure = self._failure or error
        self._done[number] = True
        self._turns[1 - number].release()

    def access(self) -> None:
        """Record that memory is about to be read or written."""
        if self._left:
            self._left -= 1
            if not self._left:
                self._left = next(self._lengths, 0)
                self.switch()

    def sleep(self, eventfd: int) -> None:
        """Sleep until signalled."""
        me: int = self._who.number
        self._waits[me] = True
        while True:
            try:
                os.eventfd_read(eventfd)
            except BlockingIOError:
                if self._failure is not None:
                    raise LostWakeUpError from None
                if self._done[1 - me] or (self._waits[1 - me] and self._idle(1 - me)):
                    raise LostWakeUpError(f"side {me} sleeps for ever") from None
                self.switch()
            else:
                self._waits[me] = False
                return

    def watch_memory(self, ring: object) -> None:
        """Watch all of a ring's views of words."""
        for name, value in vars(ring).items():
            if isinstance(value, memoryview) and value.format != "B":
                setattr(ring, name, Watched(value, self))

    def watch(self, *eventfds: int) -> None:
        """The wake-up signals of side 0 and side 1."""
        self._eventfds = eventfds

    def _idle(self, side: int) -> bool:
        fd = self._eventfds[side]
        try:
            value = os.eventfd_read(fd)
        except BlockingIOError:
            return True
        os.eventfd_write(fd, value)
        return False

    def switch(self) -> None:
        """Let the other side continue."""
        me: int = self._who.number
        if not self._done[1 - me]:
            self._turns[1 - me].release()
            self._turns[me].acquire()


class Watched:
    """A view of the ring's memory; at each access the other side may continue."""

    def __init__(self, view: memoryview, stage: Stage) -> None:
        self._view = view
        self._stage = stage

    def __getitem__(self, index: int) -> Any:
        self._stage.access()
        return self._view[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._stage.access()
        self._view[index] = value


class Counter:
    """A device that counts packets of a transmit queue."""

    backpressured = False

    def __init__(self) -> None:
        self.connections: dict[tuple[int, int, int], VirtioConnection] = {}
        self.count = 0

    def receive(self, header: Header, connection: VirtioConnection | None) -> None:
        self.count += 1

    def mark_dirty(self, connection: VirtioConnection) -> None:
        raise AssertionError("there are no connections")


class Expecting(KickCoalescing):
    """Coalescing that expects a fixed number of packets after some have arrived."""

    def __init__(self, packets: int) -> None:
        super().__init__()
        self._then = packets

    def on_packets(self, packets: int, length: int, now: float) -> None:
        self.packets = self._then if packets else 1


def play(stage: Stage, ring: Ring, driver: Driver, memory: Memory, expected: int) -> int:
    """Send PACKETS packets through a ring of SIZE; return the number that arrived.

    Where the device waits for several packets it continues to poll: its timer is always due.
    """
    counter = Counter()
    queue, coalescing = TransmitQueue(ring, CID, counter, UNTAPPED), Expecting(expected)
    place = memory.allocate(HEADER_SIZE)
    header = Header(CID, 2, 1000, 1000, op=Op.CREDIT_REQUEST).encode()
    memory.view[place : place + HEADER_SIZE] = header

    def send() -> None:
        taken = 0
        for _ in range(PACKETS):
            while not driver.has_room(1):
                used = len(driver.collect())
                taken += used
                if not used and not driver.enable_notification():
                    stage.sleep(driver.call)
            driver.add([(place, HEADER_SIZE)], writable=False)
            driver.publish()
        while taken < PACKETS:
            taken += len(driver.collect())
            if taken < PACKETS and not driver.enable_notification():
                stage.sleep(driver.call)

    def take() -> None:
        while counter.count < PACKETS:
            stage.sleep(driver.kick)
            more = True
            while more:
                more, call = queue.run(coalescing)
                if call:
                    os.eventfd_write(driver.call, 1)
                if expected > 1 and queue.packets:
                    more = True
                    stage.switch()

    stage.watch(driver.call, driver.kick)
    stage.play(send, take)
    return counter.count


RINGS = [(DriverRing, SplitRing), (PackedDriverRing, PackedRing)]


@pytest.mark.parametrize("start", [0, SIZE - 1, 2 * SIZE - 1, 0xFFFA])
@pytest.mark.parametrize(("driver_kind", "kind"), RINGS)
@settings(max_examples=100, deadline=None)
@given(schedule=schedules, event_index=st.booleans(), expected=st.integers(1, 3))
def test_no_wake_up_is_lost(
    driver_kind: type[Driver],
    kind: type[Ring],
    start: int,
    schedule: list[int],
    event_index: bool,
    expected: int,
) -> None:
    stage = Stage(schedule)
    memory = Memory(1 << 16)
    driver = driver_kind(memory, SIZE, event_index)
    driver.start_at(start)
    guest = GuestMemory()
    guest.map(GUEST_BASE, memory.size, True, memory.fd, 0)
    places = driver.descriptors, driver.available, driver.used
    addresses = GUEST_BASE + places[0], GUEST_BASE + places[1], GUEST_BASE + places[2]
    ring = kind(guest, SIZE, addresses, driver.base, event_index)
    stage.watch_memory(ring)
    stage.watch_memory(driver)
    try:
        assert play(stage, ring, driver, memory, expected) == PACKETS
    finally:
        driver.close()
        memory.close()
