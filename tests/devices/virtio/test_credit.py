"""Credit: what is exact at every moment, whatever the counters' wraps and the peer's lies."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vsockets.devices.virtio.credit import ReceiveCredit, SendCredit, distance

U32 = st.integers(0, 0xFFFF_FFFF)


@given(U32, U32)
def test_a_distance_is_taken_modulo_32_bits(start: int, length: int) -> None:
    assert distance((start + length) & 0xFFFF_FFFF, start) == length


@given(st.lists(st.tuples(st.integers(0, 1 << 31), st.integers(0, 1 << 31)), max_size=50))
def test_an_honest_receiver_is_never_sent_more_than_its_buffer(
    steps: list[tuple[int, int]],
) -> None:
    """Counters run past 2**32 many times in this."""
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
def test_a_lying_receiver_gets_no_more_than_it_says_it_can_hold(
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
def test_what_is_held_never_exceeds_the_buffer(size: int, steps: list[tuple[int, int]]) -> None:
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
def test_no_wake_up_is_lost(size: int, own: int, steps: list[tuple[int, bool]]) -> None:
    """A sender that uses all its credit is told in time: there is no way to wait for ever.

    libkrun#772, asterinas#2885: one-way flow whose sender was never told.  The sender limits
    what is on its way to the size of its ``own`` buffer, as Linux 7.3 does.
    """
    credit = ReceiveCredit(size)
    sent = known = 0
    for wanted, at_once in steps:
        length = min(wanted, min(size, own) - (sent - known))
        if not length:
            # Blocked.  Everything is passed on in the end; then it must be due.
            credit.forward(credit.held)
            assert credit.is_due(own)
        else:
            assert credit.receive(length)
            sent += length
            if at_once:
                credit.forward(credit.held)
        if credit.is_due(own):
            credit.tell()
            known = sent - credit.held
