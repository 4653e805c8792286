"""Credit: exact at every moment, for wrapping counters and false counts of the peer."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vsockets.devices.virtio.credit import (
    ReceiveCredit,
    SendCredit,
    distance,
)

U32 = st.integers(0, 0xFFFF_FFFF)


@given(U32, U32)
def test_distance_is_modulo_32_bits(start: int, length: int) -> None:
    assert distance((start + length) & 0xFFFF_FFFF, start) == length


@given(st.lists(st.tuples(st.integers(0, 1 << 31), st.integers(0, 1 << 31)), max_size=50))
def test_receiver_is_never_sent_more_than_its_buffer(
    steps: list[tuple[int, int]],
) -> None:
    """Counters pass 2**32 many times."""
    credit = SendCredit()
    sent = forwarded = 0
    buffer = 1 << 31
    for wanted, reads in steps:
        credit.update(buffer, forwarded & 0xFFFF_FFFF)
        assert credit.available() == buffer - (sent - forwarded)
        length = min(wanted, credit.available())
        credit.spend(length)
        sent += length
        forwarded += min(reads, sent - forwarded)


@given(st.lists(st.tuples(U32, U32, U32), max_size=50))
def test_false_counts_give_no_more_than_the_announced_buffer(
    steps: list[tuple[int, int, int]],
) -> None:
    """CVE-2026-23069: a count that runs ahead must not become a huge credit."""
    credit = SendCredit()
    sent = 0
    for alloc, forwarded, wanted in steps:
        credit.update(alloc, forwarded)
        assert 0 <= credit.available() <= alloc
        if (forwarded - sent) & 0xFFFF_FFFF < 1 << 31 and forwarded != sent & 0xFFFF_FFFF:
            assert credit.available() <= max(0, alloc - (1 << 31))
        length = min(wanted, credit.available())
        credit.spend(length)
        sent = sent + length & 0xFFFF_FFFF


@given(st.integers(1, 1 << 20), st.lists(st.tuples(st.integers(0, 1 << 21), U32), max_size=100))
def test_held_bytes_never_exceed_the_buffer(size: int, steps: list[tuple[int, int]]) -> None:
    credit = ReceiveCredit(size)
    held = 0
    for length, passed in steps:
        assert credit.receive(length) == (length <= size - held)
        if length <= size - held:
            held += length
        assert credit.held == held <= size
        passed = min(passed, held)
        credit.forward(passed)
        held -= passed


@given(
    st.integers(1, 4096),
    st.integers(1, 4096),
    st.lists(st.tuples(st.integers(1, 4096), st.booleans()), max_size=99),
)
def test_blocked_sender_always_gets_a_credit_update(
    size: int, own: int, steps: list[tuple[int, bool]]
) -> None:
    """A sender that uses all its credit always gets an update.

    libkrun#772, asterinas#2885: one-way flow whose sender never got one.  The sender limits its
    bytes in flight to the size of its ``own`` buffer, as Linux 7.3 does.
    """
    credit = ReceiveCredit(size)
    sent = known = 0
    for wanted, at_once in steps:
        length = min(wanted, min(size, own) - (sent - known))
        if not length:
            # Blocked.  Everything is forwarded in the end; then the update must be due.
            credit.forward(credit.held)
            assert credit.update_is_due(own)
        else:
            assert credit.receive(length)
            sent += length
            if at_once:
                credit.forward(credit.held)
        if credit.update_is_due(own):
            credit.announce()
            known = sent - credit.held


class Linux:
    """A guest's socket that counts its unread packets, and merges small ones of a stream."""

    def __init__(self, buffer: int, overhead: int, room: int) -> None:
        self.buffer, self.overhead, self.room = buffer, overhead, room
        self.queue: list[list[int]] = []  # bytes, and bytes that could be merged into them
        self.forwarded = 0

    def take(self, length: int, merges: bool) -> None:
        assert (len(self.queue) + 1) * self.overhead <= self.buffer, "ENOBUFS"
        assert sum(size for size, _ in self.queue) + length <= self.buffer, "beyond the credit"
        if merges and self.queue and length <= 128 and length < self.queue[-1][1]:
            self.queue[-1][0] += length
            self.queue[-1][1] -= length
        else:
            self.queue.append([length, self.room - length])

    def read(self, packets: int) -> None:
        self.forwarded += sum(size for size, _ in self.queue[:packets])
        del self.queue[:packets]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(1, 9000)),
        st.tuples(st.just("send"), st.integers(1, 300)),
        st.tuples(st.just("burst"), st.integers(1, 150)),
        st.tuples(st.just("read"), st.integers(1, 300)),
        st.tuples(st.just("tell"), st.just(0)),
    ),
    max_size=300,
)
BUFFERS = st.one_of(st.integers(1024, 20_000), st.sampled_from([65_536, 262_144]))


@settings(deadline=None)
@given(STEPS, BUFFERS, st.sampled_from([576, 1024]), st.sampled_from([3732, 4096]))
def test_unread_packets_of_a_stream_stay_below_the_limit(
    steps: list[tuple[str, int]], buffer: int, overhead: int, room: int
) -> None:
    """A stream with a large buffer never waits because of its packets while it has credit."""
    guest, credit, waiting = Linux(buffer, overhead, room), SendCredit(), 0

    def send() -> None:
        nonlocal waiting
        while waiting and credit.available():
            most = credit.packet_size(room) if credit.is_half_full else room
            assert most or buffer < 20_000
            length = min(waiting, credit.available(), most)
            if not length:
                return
            credit.spend(length, room=room - length)
            guest.take(length, merges=True)
            waiting -= length

    def send_update() -> None:
        credit.update(buffer, guest.forwarded & 0xFFFF_FFFF)

    send_update()
    for what, number in steps:
        if what == "read":
            guest.read(number)
        elif what == "tell":
            send_update()
        for _ in range(100 if what == "burst" else 1):
            waiting += number if what in ("send", "burst") else 0
            send()
    while waiting:
        before = waiting
        guest.read(len(guest.queue))
        send_update()
        send()
        assert waiting < before


@settings(deadline=None)
@given(STEPS, BUFFERS, st.sampled_from([576, 1024]))
def test_message_waits_for_its_reader(
    steps: list[tuple[str, int]], buffer: int, overhead: int
) -> None:
    guest, credit = Linux(buffer, overhead, 4096), SendCredit()
    waiting: list[int] = []

    def send() -> None:
        while waiting and credit.available() >= waiting[0]:
            parts = range(0, max(waiting[0], 1), 4096)
            if not credit.admits_message(len(parts)):
                return
            size = waiting.pop(0)
            if size or credit.admits_empty_message():
                for at in parts:
                    credit.spend(min(4096, size - at))
                    guest.take(min(4096, size - at), merges=False)

    def send_update() -> None:
        credit.update(buffer, guest.forwarded & 0xFFFF_FFFF)

    send_update()
    for what, number in steps:
        if what == "read":
            guest.read(number)
        elif what == "tell":
            send_update()
        elif number <= min(buffer, 4096):
            waiting += [number] if what == "send" else [number % 2] * 100
        send()
    while waiting:
        before = len(waiting)
        guest.read(len(guest.queue))
        send_update()
        send()
        assert len(waiting) < before
