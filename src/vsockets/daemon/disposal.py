"""Closing descriptors that a program sent and should not have.

Closing can wait: for a file system in user space to be told, for a TCP socket that lingers.
The one who sent the descriptor may hold up such a close for ever, so it is not vsockd's own
thread that closes it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading

_queue: queue.SimpleQueue[int] = queue.SimpleQueue()
_started = threading.Lock()


def dispose(fd: int) -> None:
    """Close ``fd`` soon, without waiting for it."""
    _queue.put(fd)
    if _started.acquire(blocking=False):
        threading.Thread(target=_close_all, name="disposal", daemon=True).start()


def _close_all() -> None:
    while True:
        with contextlib.suppress(OSError):
            os.close(_queue.get())
