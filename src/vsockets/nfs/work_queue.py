"""Calls that take long, and are answered after others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple


class Later(Exception):
    """A call has to be done again when ``steps`` are through."""

    def __init__(self, steps: Iterator[object]) -> None:
        super().__init__("not yet")
        self.steps = steps


class Pending(NamedTuple):
    """A call whose answer ``finish`` returns when ``steps`` are through, or have failed."""

    steps: Iterator[object]
    finish: Callable[[OSError | None], bytes | Pending | None]
