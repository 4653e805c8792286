"""Buffer sizes: clamping as in Linux, and the negotiation of guide page 14."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vsockets.model.buffers import BufferSizes, negotiate

sizes = st.integers(0, 2**64 - 1) | st.integers(0, 1 << 20)


@st.composite
def ordered(draw: st.DrawFn) -> BufferSizes:
    """Draw sizes that setting options in any order can produce, unless the limits conflict."""
    minimum, size, maximum = sorted(draw(st.tuples(sizes, sizes, sizes)))
    return BufferSizes(size, minimum, maximum)


def test_defaults_are_those_of_the_guide() -> None:
    assert BufferSizes() == (65_536, 128, 262_144)


@given(ordered(), sizes)
def test_size_is_clamped_to_the_limits(before: BufferSizes, wanted: int) -> None:
    after = before.with_size(wanted)
    assert (after.minimum, after.maximum) == (before.minimum, before.maximum)
    assert after.minimum <= after.size <= after.maximum
    if before.minimum <= wanted <= before.maximum:
        assert after.size == wanted


@given(ordered(), sizes)
def test_size_follows_the_limits(before: BufferSizes, limit: int) -> None:
    lower = before.with_minimum(limit)
    assert lower == (max(before.size, limit), limit, before.maximum)
    upper = before.with_maximum(limit)
    assert upper.maximum == limit
    assert upper.size == max(min(before.size, limit), before.minimum)


def test_minimum_above_maximum_wins_as_in_linux() -> None:
    at_odds = BufferSizes().with_maximum(64)
    assert at_odds == (128, 128, 64)
    assert at_odds.with_size(1000).size == 128


def test_changes_return_a_new_value() -> None:
    before = BufferSizes()
    before.with_size(4096)
    assert before == BufferSizes()


# Negotiation


def test_the_guides_example() -> None:
    """Page 14: halve the buffers from 65536 to 32768 and check the result."""
    halved = BufferSizes().with_size(32_768)
    assert halved == (32_768, 128, 262_144)
    assert negotiate(halved, BufferSizes()) == 32_768


def test_side_that_accepts_less_proposes_its_own_size() -> None:
    small = BufferSizes().with_maximum(32_768)
    assert negotiate(BufferSizes(), small) == 32_768
    assert negotiate(small, BufferSizes()) == 32_768


@given(ordered(), ordered())
def test_negotiated_size(client: BufferSizes, server: BufferSizes) -> None:
    agreed = negotiate(client, server)
    if server.minimum <= client.size <= server.maximum:
        assert agreed == client.size
    elif client.minimum <= server.size <= client.maximum:
        assert agreed == server.size
    else:
        assert agreed is None


@given(ordered(), ordered())
def test_negotiated_size_is_within_both_limits(client: BufferSizes, server: BufferSizes) -> None:
    agreed = negotiate(client, server)
    if agreed is not None:
        assert client.minimum <= agreed <= client.maximum
        assert server.minimum <= agreed <= server.maximum
        assert agreed in (client.size, server.size)


@given(ordered(), ordered())
def test_agreement_is_symmetric(one: BufferSizes, other: BufferSizes) -> None:
    assert (negotiate(one, other) is None) == (negotiate(other, one) is None)


@given(ordered(), ordered())
def test_no_agreement_without_a_common_size(one: BufferSizes, other: BufferSizes) -> None:
    if one.maximum < other.minimum:
        assert negotiate(one, other) is None


@given(ordered())
def test_equal_sides_agree(side: BufferSizes) -> None:
    assert negotiate(side, side) == side.size
