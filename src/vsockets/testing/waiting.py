"""Waiting for a condition, instead of sleeping and hoping."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], what: str = "", seconds: float = 20.0) -> T:
    """Ask ``condition`` until it answers something true, and return that.

    Raises AssertionError, naming ``what`` was waited for, after ``seconds``.
    """
    deadline = time.monotonic() + seconds
    pause = 0.0005
    while not (answer := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds} s for {what or condition}, in vain")
        time.sleep(pause)
        pause = min(pause * 2, 0.05)
    return answer
