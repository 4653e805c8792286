"""Deferred work, done in steps."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator

import pytest

from vsockets.daemon.scheduling import DeferredWork
from vsockets.eventloop.loop import EventLoop


@pytest.fixture
def loop() -> EventLoop:
    return EventLoop()


def run_until(loop: EventLoop, condition: Callable[[], bool]) -> None:
    """Run the loop until ``condition`` is true; a loop can run once."""

    def check() -> None:
        if condition():
            loop.stop()
        else:
            loop.call_later(0.001, check)

    check()
    loop.run()


def steps(name: str, number: int, done: list[str]) -> Iterator[None]:
    for _ in range(number):
        done.append(name)
        yield


def test_tasks_take_turns(loop: EventLoop) -> None:
    deferred, done = DeferredWork(loop), list[str]()
    deferred.start("a", steps("a", 3, done))
    deferred.start("b", steps("b", 2, done))
    deferred.start("c", steps("c", 1, done))
    run_until(loop, lambda: len(done) == 6)
    assert done == ["a", "b", "c", "a", "b", "a"]


def test_a_task_in_progress_is_not_started_again(loop: EventLoop) -> None:
    deferred, done = DeferredWork(loop), list[str]()
    deferred.start("a", steps("first", 2, done))
    deferred.start("a", steps("second", 2, done))

    def third_has_begun() -> bool:
        if len(done) >= 2:  # no effect until the first task is complete
            deferred.start("a", steps("third", 1, done))
        return "third" in done

    run_until(loop, third_has_begun)
    assert done == ["first", "first", "third"]


def test_a_failing_task_is_logged_and_others_continue(
    loop: EventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    def failing() -> Iterator[None]:
        yield
        raise OverflowError("as a test")

    deferred, done = DeferredWork(loop), list[str]()
    deferred.start("failing", failing())
    deferred.start("a", steps("a", 3, done))
    run_until(loop, lambda: len(done) == 3 and bool(caplog.records))
    assert done == ["a"] * 3
    (record,) = caplog.records
    assert record.levelno == logging.ERROR and record.exc_info


def test_requests_are_served_between_the_steps_of_a_task(loop: EventLoop) -> None:
    deferred, done = DeferredWork(loop), list[str]()
    ours, theirs = socket.socketpair()

    def serve(events: int) -> None:
        ours.recv(1)
        done.append("request")
        theirs.send(b"x")

    with ours, theirs:
        loop.watch(ours.fileno(), serve)
        deferred.start("a", steps("step", 10, done))
        theirs.send(b"x")
        run_until(loop, lambda: done.count("step") == 10)
        loop.unwatch(ours.fileno())
    between = "".join(one[0] for one in done)
    assert "pp" not in between
