"""Number of packets for which the device waits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vsockets.devices.limits import (
    VIRTIO_BUFFER_BYTES,
    VIRTIO_KICK_DELAY_SECONDS,
    VIRTIO_PACKETS_PER_KICK_MAX,
)
from vsockets.devices.virtio.tx import KickCoalescing

PACKET = 4096


def streaming(
    coalescing: KickCoalescing, interval: float, packets: int = 200, size: int = PACKET
) -> float:
    """Simulate a guest that sends a packet each ``interval`` seconds; return the last one's
    time.
    """
    now = 10.0
    while packets > 0:
        taken = coalescing.packets
        now += taken * interval
        coalescing.on_packets(taken, taken * size, now)
        packets -= taken
    return now


def test_replies_keep_one_packet_per_kick() -> None:
    coalescing = KickCoalescing()
    for number in range(1000):
        coalescing.on_packets(1, PACKET, number * 1e-5)
        assert coalescing.packets == 1
        coalescing.on_reply()


def test_streaming_guest_kicks_once_for_several_packets() -> None:
    coalescing = KickCoalescing()
    streaming(coalescing, 10e-6)
    assert coalescing.packets == VIRTIO_PACKETS_PER_KICK_MAX


def test_batch_leaves_credit_for_the_wake_up() -> None:
    coalescing = KickCoalescing()
    streaming(coalescing, 10e-6, packets=20, size=65_536)
    assert coalescing.packets * 65_536 == VIRTIO_BUFFER_BYTES * 3 // 4


def test_slow_packets_are_not_batched() -> None:
    coalescing = KickCoalescing()
    streaming(coalescing, VIRTIO_KICK_DELAY_SECONDS)
    assert coalescing.packets == 1


def test_batch_falls_to_the_number_that_arrived() -> None:
    coalescing = KickCoalescing()
    now = streaming(coalescing, 10e-6)
    coalescing.on_packets(3, 3 * PACKET, now + 100e-6)
    assert coalescing.packets == 3


def test_empty_poll_ends_batching() -> None:
    coalescing = KickCoalescing()
    now = streaming(coalescing, 10e-6)
    coalescing.on_packets(0, 0, now + 100e-6)
    assert coalescing.packets == 1


looks = st.lists(
    st.one_of(
        st.none(),
        st.tuples(st.integers(0, 256), st.integers(0, 1 << 24), st.floats(0, 10)),
    )
)


@given(looks)
def test_delay_is_bounded(looks: list[tuple[int, int, float] | None]) -> None:
    coalescing = KickCoalescing()
    now = 0.0
    for look in looks:
        if look is None:
            coalescing.on_reply()
            assert coalescing.packets == 1
        else:
            packets, length, pause = look
            now += pause
            coalescing.on_packets(packets, length if packets else 0, now)
            assert 1 <= coalescing.packets <= VIRTIO_PACKETS_PER_KICK_MAX
            assert coalescing.packets == 1 or 0 < coalescing.delay <= VIRTIO_KICK_DELAY_SECONDS
