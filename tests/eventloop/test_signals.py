"""Signals that end a loop's wait, including those that arrive just before it."""

from __future__ import annotations

import asyncio
import ctypes
import operator
import os
import select
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

from vsockets.eventloop.loop import EventLoop
from vsockets.eventloop.service import on_signals

#: Wait in seconds of a loop that misses the signal.
_TOO_LATE = 5.0


def after_a_signal(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``call``, which is preceded by a SIGTERM the first time.

    C code runs both, so that Python cannot run a handler in between.
    """
    signals = [partial(ctypes.CDLL(None)["raise"], int(signal.SIGTERM))]

    def signal_and_call(*arguments: Any) -> Any:
        calls = (*signals, partial(call, *arguments))
        signals.clear()
        return list(map(operator.call, calls))[-1]

    return signal_and_call


def test_signal_just_before_the_wait_ends_it() -> None:
    loop = EventLoop()
    events = []
    loop.call_later(_TOO_LATE, lambda: events.append("late"))
    loop.call_later(_TOO_LATE, loop.stop)
    loop._poll = after_a_signal(loop._poll)

    def stop() -> None:
        events.append("signal")
        loop.stop()

    with loop.signalled({signal.SIGTERM: stop}):
        loop.run()
    assert events == ["signal"]


def test_timer_signals_neither_end_nor_spin_the_loop() -> None:
    loop = EventLoop()
    waits: list[float | None] = []
    poll = loop._poll

    def recording_poll(wait: float | None) -> list[tuple[int, int]]:
        waits.append(wait)
        return poll(wait)

    loop._poll = recording_poll  # type: ignore[assignment]
    loop.call_later(0.2, loop.stop)
    with loop.signalled({signal.SIGTERM: loop.stop}), loop.interrupting_calls(0.005):
        signal.raise_signal(signal.SIGALRM)
        loop.run()
    assert len(waits) < 10


class Signalling:
    """The epoll object of asyncio's loop, with a signal just before the first wait."""

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll
        self.poll = after_a_signal(epoll.poll)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)


def test_signal_just_before_the_wait_of_asyncio_ends_it() -> None:
    events = []

    async def wait() -> None:
        loop = asyncio.get_running_loop()
        old_handler, old_wakeup = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
        ended = asyncio.Event()

        def end(event: str) -> None:
            events.append(event)
            ended.set()

        try:
            on_signals({signal.SIGTERM: lambda: end("signal")})
            timer = loop.call_later(_TOO_LATE, end, "late")
            selector = loop._selector  # type: ignore[attr-defined]
            selector._selector = Signalling(selector._selector)
            await ended.wait()
            timer.cancel()
        finally:
            signal.signal(signal.SIGTERM, old_handler)
            os.close(signal.set_wakeup_fd(old_wakeup))

    asyncio.run(wait())
    assert events == ["signal"]
