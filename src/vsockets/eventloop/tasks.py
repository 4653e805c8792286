"""What programs that serve until they are told to stop have in common."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Mapping


def on_signals(calls: Mapping[signal.Signals, Callable[[], object]]) -> None:
    """Have the running loop call a function for each of these signals, until the program ends.

    asyncio's own handlers write to a socket that the loop closes before it removes them, which
    ends in a traceback when a signal comes between.  After the loop's end these do nothing.
    """
    loop = asyncio.get_running_loop()

    def handle(number: int, frame: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(calls[signal.Signals(number)])

    for number in calls:
        signal.signal(number, handle)


async def wait_first(*awaitables: object) -> None:
    """Return when the first is done, and raise what it raises; the others are called off."""
    tasks = [asyncio.ensure_future(one) for one in awaitables]  # type: ignore[call-overload]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
