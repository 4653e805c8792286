"""Times at which the transmit queue is polled, and at which the guest is notified."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from support.virtio_driver import GUEST_BASE, DriverRing, Memory
from vsockets.devices.capture import CaptureSink
from vsockets.devices.guest_memory import GuestMemory
from vsockets.devices.limits import VIRTIO_USED_BATCH_PACKETS
from vsockets.devices.loop import DeviceLoop
from vsockets.devices.vhost_user import Vring
from vsockets.devices.virtio.connection import VirtioConnection
from vsockets.devices.virtio.packet import HEADER_SIZE, Header, Op
from vsockets.devices.virtio.ring import SplitRing
from vsockets.devices.virtio.tx import KickCoalescing, TransmitQueue, TxPoll
from vsockets.testing import wait_until

CID = 5
SIZE = 128


class Streams(KickCoalescing):
    """Coalescing for a streaming guest: after some packets it expects four more."""

    def __init__(self, delay: float) -> None:
        super().__init__()
        self._then = delay

    def on_packets(self, packets: int, length: int, now: float) -> None:
        self.packets, self.delay = (4, self._then) if packets else (1, 0.0)


class Rig:
    """A running queue and its driver; received packets are counted."""

    backpressured = False

    def __init__(self) -> None:
        self.connections: dict[tuple[int, int, int], VirtioConnection] = {}
        self.count = 0
        self.memory = Memory(1 << 16)
        self.driver = DriverRing(self.memory, SIZE)
        guest = GuestMemory()
        guest.map(GUEST_BASE, self.memory.size, True, self.memory.fd, 0)
        places = self.driver.descriptors, self.driver.available, self.driver.used
        addresses = GUEST_BASE + places[0], GUEST_BASE + places[1], GUEST_BASE + places[2]
        ring = SplitRing(guest, SIZE, addresses, 0, event_index=True)
        self.vring = Vring()
        self.vring.size = SIZE
        self.vring.take("call", os.dup(self.driver.call))
        self.loop = DeviceLoop()
        self.tx_poll = TxPoll(
            self.loop, TransmitQueue(ring, CID, self, CaptureSink(self.loop)), self.vring, self.work
        )
        self.place = self.memory.allocate(HEADER_SIZE)
        header = Header(CID, 2, 1000, 1000, op=Op.CREDIT_REQUEST).encode()
        self.memory.view[self.place : self.place + HEADER_SIZE] = header

    def receive(self, header: Header, connection: VirtioConnection | None) -> None:
        self.count += 1

    def mark_dirty(self, connection: VirtioConnection) -> None:
        raise AssertionError("there are no connections")

    def work(self) -> None:
        assert not self.tx_poll.run()

    def send(self) -> bool:
        """Send one packet; return whether the device requested a kick."""
        self.driver.add([(self.place, HEADER_SIZE)], writable=False)
        return self.driver.publish()

    def was_notified(self) -> bool:
        try:
            os.eventfd_read(self.driver.call)
        except BlockingIOError:
            return False
        return True

    def wait_until_notified(self) -> bool:
        self.loop.turn()
        return self.was_notified()

    def close(self) -> None:
        self.tx_poll.stop()
        self.loop.close()
        self.vring.close()
        self.driver.close()
        self.memory.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def test_packets_without_a_kick_are_polled(rig: Rig) -> None:
    rig.tx_poll.coalescing = Streams(0.001)
    rig.send()
    rig.work()
    assert not rig.send()

    def has_come() -> bool:
        rig.loop.turn()
        return rig.count == 2

    wait_until(has_come, "the packet to be taken")
    assert rig.driver.used


def test_full_batch_kicks(rig: Rig) -> None:
    rig.tx_poll.coalescing = Streams(10.0)
    rig.send()
    rig.work()
    assert [rig.send() for _ in range(4)] == [False, False, False, True]


def test_empty_poll_requests_a_kick_for_the_next_packet(rig: Rig) -> None:
    rig.tx_poll.coalescing = Streams(0.001)
    rig.send()
    rig.work()
    rig.work()
    assert rig.send()


def test_few_used_buffers_are_notified_after_a_delay(rig: Rig) -> None:
    rig.send()
    rig.work()
    assert not rig.was_notified()
    wait_until(rig.wait_until_notified, "the guest to be told")


def test_full_batch_of_used_buffers_is_notified_at_once(rig: Rig) -> None:
    for _ in range(VIRTIO_USED_BATCH_PACKETS):
        rig.send()
        rig.work()
    assert rig.was_notified()


def test_stopped_ring_has_no_pending_notification(rig: Rig) -> None:
    rig.send()
    rig.work()
    assert not rig.was_notified()
    assert rig.tx_poll.stop() == 1
    assert rig.was_notified()
