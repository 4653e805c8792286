"""Waiting for a condition by polling."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from ..eventloop.retry import Backoff

T = TypeVar("T")


def wait_until(condition: Callable[[], T], what: str = "", seconds: float = 20.0) -> T:
    """Call ``condition`` until its result is true, and return that result.

    Raises AssertionError with ``what`` after ``seconds``.
    """
    deadline = time.monotonic() + seconds
    backoff = Backoff(0.0005, 0.05)
    while not (answer := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"timed out after {seconds} s waiting for {what or condition}")
        time.sleep(backoff.next_pause())
    return answer
