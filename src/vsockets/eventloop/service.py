"""The life of a service in an asyncio loop: ready, reload, drain, stop.

SIGTERM or SIGINT starts the drain (the orderly end of connections); a second signal cuts it short.
SIGUSR2 has another process take over (:mod:`.replacement`).
Programs that run the epoll loop of :mod:`.loop` (vsockd and the devices) have
:meth:`.loop.EventLoop.signalled` instead.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Mapping

from .._linux.process import notify_ready
from .replacement import Replacement, close_unused, take_over


async def run_service(
    ready: Callable[[], object],
    work: Awaitable[object] | None = None,
    *,
    drain: Callable[[], Awaitable[object]] | None = None,
    reload: Callable[[], object] | None = None,
    retire: Callable[[], Awaitable[object]] | None = None,
) -> None:
    """Run a service until ``work`` is done, or SIGTERM or SIGINT arrives and the drain is done.

    ``ready`` is called once signals are handled; it opens or announces what clients connect to.
    Then the service manager is notified.  ``reload`` is called at each SIGHUP.  ``retire`` is
    called when another process takes over: see :class:`.replacement.Replacement`.

    Raises what ``ready``, ``work`` or ``drain`` raises.
    """
    stopping, stopped = asyncio.Event(), asyncio.Event()

    def stop() -> None:
        (stopped if stopping.is_set() else stopping).set()

    replacement = Replacement(retire, stop, reload)
    on_signals(replacement.signals)
    waits = [stopping.wait(), replacement.retired.wait(), *([work] if work is not None else ())]
    tasks = [asyncio.ensure_future(one) for one in waits]
    try:
        ready()
        take_over()
        close_unused()
        notify_ready()
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if replacement.retired.is_set():
            await wait_first(replacement.finished(), stopping.wait())
        else:
            for task in done:
                task.result()
        if stopping.is_set():  # ``work`` goes on meanwhile
            ends = [replacement.workers_ended(), *([drain()] if drain is not None else ())]
            await wait_first(asyncio.gather(*ends), stopped.wait())
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def keep_service(pause: float) -> int:
    """Hold this process's open listeners while other processes of its command serve them.

    Returns the exit status of the last one.  See :meth:`.replacement.Replacement.keep`.
    """
    replacement = Replacement(None, lambda: None, None)
    on_signals(replacement.signals)
    return await replacement.keep(pause, notify_ready)


def on_signals(calls: Mapping[signal.Signals, Callable[[], object]]) -> None:
    """Have the running loop call the function that ``calls`` has for a signal.

    The handlers stay until the program ends.  Must be called in the main thread.  asyncio's own
    handlers write to a socket that the loop closes before it removes them: a signal in between ends
    in a traceback.  The pipe used here stays open, so that a signal after the loop's end has no
    effect.
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
    # would be handled after the wait.  The wakeup descriptor is written to at once.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)


def _ignore(number: int, frame: object) -> None:
    pass


async def wait_first(*awaitables: Awaitable[object]) -> None:
    """Return when one of ``awaitables`` is done; cancel the others.

    Raises the exception of the awaitable that is done, if any.
    """
    tasks = [asyncio.ensure_future(one) for one in awaitables]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
