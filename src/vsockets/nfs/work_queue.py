"""Calls that take long: other calls are answered between their steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple


class NotReady(Exception):
    """The call must be repeated when all ``steps`` are done."""

    def __init__(self, steps: Iterator[object]) -> None:
        super().__init__("not yet")
        self.steps = steps


class Pending(NamedTuple):
    """An unfinished call: ``finish`` returns the reply when ``steps`` are done or have failed."""

    steps: Iterator[object]
    finish: Callable[[OSError | None], bytes | Pending | None]
