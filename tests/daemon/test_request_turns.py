"""Requests served per party in one turn of the loop."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from vsockets.daemon.channel import close_socket
from vsockets.daemon.limits import (
    DAEMON_ENDS_PER_TURN_MAX,
    DAEMON_NOTICED_CALL_SECONDS,
    DAEMON_PAUSE_MAX_SECONDS,
    DAEMON_REQUESTS_PER_TURN_MAX,
)
from vsockets.daemon.scheduling import RequestTurns
from vsockets.eventloop.loop import EventLoop, Timer
from vsockets.fabric import Limits, Party

from .test_loop import run_once


class Clients:
    """Connections of one party to a :class:`RequestTurns`, each with unread data."""

    def __init__(self, turns: RequestTurns, name: str, number: int) -> None:
        self.party = Party(name, Limits())
        self.served: list[int] = []
        self.blocks = 0.0  # seconds for which each request blocks vsockd
        self.pairs = [socket.socketpair() for _ in range(number)]
        self._turns = turns
        for index, (ours, theirs) in enumerate(self.pairs):
            theirs.send(b"x")
            turns.watch(self.party, ours.fileno(), partial(self._serve, index))

    def _serve(self, index: int, hung_up: bool) -> None:
        self.served.append(index)
        self.party.blocked = self.blocks
        ours, _ = self.pairs[index]
        if hung_up or not ours.recv(1):
            self._turns.unwatch(self.party, ours.fileno())

    def serve_first(self, hung_up: bool) -> None:
        self._serve(0, hung_up)

    def close(self) -> None:
        for ours, theirs in self.pairs:
            self._turns.unwatch(self.party, ours.fileno())
            ours.close()
            theirs.close()


def note_that(served: list[str], name: str, hung_up: bool) -> None:
    served.append(name)


class Loop(EventLoop):
    """A loop whose timers, except :func:`run_once`'s, are run by the test."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[tuple[float, Callable[[], None]]] = []

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        if not seconds:
            return super().call_later(seconds, callback)
        self.pauses.append((seconds, callback))
        return Timer(callback)


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def turns(loop: EventLoop) -> RequestTurns:
    return RequestTurns(loop)


@contextlib.contextmanager
def clients(turns: RequestTurns, name: str, number: int) -> Iterator[Clients]:
    made = Clients(turns, name, number)
    try:
        yield made
    finally:
        made.close()


def test_a_party_with_many_requests_has_some_of_them_served_in_a_turn(
    loop: EventLoop, turns: RequestTurns
) -> None:
    with clients(turns, "many", 100) as many, clients(turns, "one", 1) as one:
        run_once(loop)
        assert (len(many.served), len(one.served)) == (DAEMON_REQUESTS_PER_TURN_MAX, 1)
        while len(many.served) < 100:
            run_once(loop)
        assert sorted(many.served) == list(range(100))


def test_hang_ups_are_served_before_every_request(loop: EventLoop, turns: RequestTurns) -> None:
    """Of any party: a port released before a request was made is free."""
    with clients(turns, "asks", 3) as asks, clients(turns, "ended", 3) as ended:
        served: list[str] = []
        for made, name in ((asks, "asks"), (ended, "ended")):
            for ours, _ in made.pairs:
                turns.unwatch(made.party, ours.fileno())
                note = partial(note_that, served, name)
                turns.watch(made.party, ours.fileno(), note)
        for _, theirs in ended.pairs:
            theirs.close()
        run_once(loop)
        assert served == ["ended"] * 3 + ["asks"] * 3


def test_many_hang_ups_are_served_in_turns(loop: EventLoop, turns: RequestTurns) -> None:
    number = 2 * DAEMON_ENDS_PER_TURN_MAX
    with clients(turns, "many", number) as many:
        for ours, theirs in many.pairs:
            ours.recv(1)
            theirs.close()
        run_once(loop)
        assert len(many.served) == DAEMON_ENDS_PER_TURN_MAX
        run_once(loop)
        assert sorted(many.served) == list(range(number))


@pytest.mark.parametrize("hung_up", [False, True])
def test_a_party_that_has_blocked_vsockd_is_served_again_later(
    loop: Loop, turns: RequestTurns, hung_up: bool
) -> None:
    """Others are served meanwhile, and no more of its requests in the same turn."""
    with clients(turns, "slow", 3) as slow, clients(turns, "other", 2) as other:
        slow.blocks = 1e9  # as if vsockd had been stopped meanwhile: the pause is limited
        if hung_up:
            for ours, theirs in slow.pairs:
                ours.recv(1)
                theirs.close()
        for _ in range(5):
            run_once(loop)
        assert (len(slow.served), len(other.served)) == (1, 2)
        ((seconds, resume),) = loop.pauses
        assert seconds == DAEMON_PAUSE_MAX_SECONDS
        slow.blocks = 0.0
        resume()
        run_once(loop)
        assert sorted(slow.served) == [0, 1, 2]


def test_a_party_closes_its_connections_during_its_pause(loop: Loop, turns: RequestTurns) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with clients(turns, "slow", 1) as slow:
        slow.blocks = 1e-6
        run_once(loop)
    with clients(turns, "slow", 1) as again:
        turns.unwatch(again.party, again.pairs[0][0].fileno())
        turns.watch(slow.party, again.pairs[0][0].fileno(), again.serve_first)
        run_once(loop)
        assert not again.served
        ((_, resume),) = loop.pauses
        resume()
        run_once(loop)
        assert again.served == [0]
        turns.unwatch(slow.party, again.pairs[0][0].fileno())
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_failing_callback_is_logged(
    loop: EventLoop, turns: RequestTurns, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(hung_up: bool) -> None:
        raise OverflowError("as a test")

    with clients(turns, "one", 2) as made:
        ours = made.pairs[0][0]
        turns.unwatch(made.party, ours.fileno())
        turns.watch(made.party, ours.fileno(), fail)
        run_once(loop)
        assert made.served == [1]
    (record,) = caplog.records
    assert record.levelno == logging.ERROR and record.exc_info


def test_parties_without_connections_keep_no_descriptor(
    loop: EventLoop, turns: RequestTurns
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(10):
        with clients(turns, f"party {number}", 1):
            run_once(loop)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("sleeps", [False, True])
def test_only_a_call_that_slept_counts_against_its_party(sleeps: bool) -> None:
    """Another is long because other programs use the processor, which the party has not caused."""

    class SlowToClose(socket.socket):
        def close(self) -> None:
            end = time.monotonic() + 5 * DAEMON_NOTICED_CALL_SECONDS
            if sleeps:
                time.sleep(5 * DAEMON_NOTICED_CALL_SECONDS)
            while time.monotonic() < end:
                pass
            super().close()

    party = Party("a party", Limits())
    close_socket(SlowToClose(), party)
    assert bool(party.blocked) is sleeps


def test_a_failed_watch_leaves_nothing(loop: EventLoop, turns: RequestTurns) -> None:
    party = Party("a", Limits())
    ours, theirs = socket.socketpair()
    with ours, theirs:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(OSError) as failure:  # for the party's epoll
                turns.watch(party, ours.fileno(), lambda hung_up: None)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert failure.value.errno == errno.EMFILE
        lowest = os.dup(ours.fileno())
        os.close(lowest)
        with pytest.raises(OSError):  # of a descriptor that is not open
            turns.watch(party, lowest + 100, lambda hung_up: None)
        assert os.dup(ours.fileno()) == lowest, "the party's epoll is open"
        os.close(lowest)
        served: list[bool] = []
        turns.watch(party, ours.fileno(), served.append)
        theirs.send(b"x")
        run_once(loop)
        assert served == [False]
        turns.unwatch(party, ours.fileno())
