"""Pauses between repeated attempts."""

from __future__ import annotations

from itertools import pairwise

from vsockets.eventloop.retry import Backoff


def test_pauses_double_up_to_the_longest() -> None:
    backoff = Backoff(0.5, 3.0)
    assert [backoff.next_pause() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    backoff.reset()
    assert backoff.next_pause() == 0.5


def test_jitter_stays_in_the_upper_half_of_each_pause() -> None:
    backoff = Backoff(1.0, 1.0, jitter=True)
    pauses = [backoff.next_pause() for _ in range(100)]
    assert all(0.5 <= pause <= 1.0 for pause in pauses)
    assert any(one != other for one, other in pairwise(pauses))


def test_attempt_after_the_deadline_is_not_permitted() -> None:
    backoff = Backoff(1000.0, 4000.0)
    assert backoff.permits(2000)
    assert not backoff.permits(999)
    backoff.next_pause()
    assert not backoff.permits(1999)
    assert not Backoff().permits(0)
