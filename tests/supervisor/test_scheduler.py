"""The scheduler's waits for one socket, by copies that it closes."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator

import pytest

from vsockets.supervisor.scheduler import CoroutineScheduler, lent


@pytest.fixture(autouse=True)
def no_descriptor_is_closed_meanwhile() -> None:
    """Close what earlier tests left: a copy with another number has a registration of its own."""
    gc.collect()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


class Waiter:
    """A wait for ``sock``, begun again ``times`` times."""

    def __init__(self, scheduler: CoroutineScheduler, sock: socket.socket, times: int) -> None:
        self._scheduler = scheduler
        self._sock = sock
        self._times = times
        self.resumed = 0
        self.key = self._add()

    def _add(self) -> int:
        fd = self._sock.fileno()
        return self._scheduler.add(lent(os.dup(fd), os.fstat(fd).st_ino, None), self._resume)

    def _resume(self, happened: bool) -> None:
        assert happened
        self.resumed += 1
        if self.resumed <= self._times:
            self._add()


def test_one_event_resumes_one_of_those_that_wait_again(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    scheduler = CoroutineScheduler()
    waiters = [Waiter(scheduler, ours, times=100) for _ in range(50)]
    theirs.send(b"x")
    for _ in range(4):  # nobody reads it: each takes its turn
        scheduler.poll()
    assert [one.resumed for one in waiters] == [1] * 4 + [0] * 46


def test_one_event_resumes_all_that_do_not_wait_again(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    scheduler = CoroutineScheduler()
    waiters = [Waiter(scheduler, ours, times=0) for _ in range(5)]
    theirs.send(b"x")
    scheduler.poll()
    assert [one.resumed for one in waiters] == [1] * 5


def test_a_cancelled_wait_hands_the_event_on(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    scheduler = CoroutineScheduler()
    first, second = (Waiter(scheduler, ours, times=0) for _ in range(2))
    scheduler.cancel(first.key)
    theirs.send(b"x")
    scheduler.poll()
    assert (first.resumed, second.resumed) == (0, 1)


def test_more_sockets_are_waited_for_than_registrations_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vsockets.supervisor.scheduler._KEPT", 4)
    scheduler = CoroutineScheduler()
    pairs = [socket.socketpair() for _ in range(20)]
    waiters = [Waiter(scheduler, ours, times=1) for ours, _ in pairs for _ in range(2)]
    for ours, theirs in pairs:
        theirs.send(b"x")
        scheduler.poll()
        ours.recv(1)
    assert [one.resumed for one in waiters] == [1, 0] * 20
    for one, other in pairs:
        one.close()
        other.close()
