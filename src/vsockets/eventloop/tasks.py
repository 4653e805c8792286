"""What programs that serve until they are told to stop have in common."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Mapping


def on_signals(calls: Mapping[signal.Signals, Callable[[], object]]) -> None:
    """Have the running loop call a function for each of these signals, until the program ends.

    Only for the main thread.  asyncio's own handlers write to a socket that the loop closes before
    it removes them: a signal in between ends in a traceback.  This pipe stays open, so that a
    signal after the loop's end does nothing.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def dispatch() -> None:
        for number in os.read(reader, 4096):
            if call := calls.get(signal.Signals(number)):
                call()

    asyncio.get_running_loop().add_reader(reader, dispatch)
    for number in calls:
        signal.signal(number, _ignore)
    # Python runs a handler between two of its instructions: a signal just before the loop waits
    # would be handled after the wait.  It writes to this descriptor at once.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)


def _ignore(number: int, frame: object) -> None:
    pass


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
