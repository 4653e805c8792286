"""Full-screen views of the terminal, refreshed until q or Ctrl-C."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from .options import Decorator, seconds_option

if TYPE_CHECKING:
    from rich.console import RenderableType


def interval_option(default: float) -> Decorator[Any]:
    """Declare ``--interval``."""
    return seconds_option(
        "--interval", min=0.1, default=default, help="Time between two updates, in seconds."
    )


class View(ABC):
    """The content of a full-screen view."""

    #: descriptors; when one is readable, ``read_source`` is called
    sources: Sequence[int] = ()

    @abstractmethod
    def update(self) -> None:
        """Fetch the current state; called once each interval."""

    @abstractmethod
    def draw(self, width: int, height: int) -> RenderableType:
        """Return the view, ``width`` characters by ``height`` lines."""

    def read_source(self) -> None:  # noqa: B027 - optional: most views have no sources
        """Read from the descriptors in :attr:`sources`, at least one of which is readable."""

    def press(self, keys: str) -> None:  # noqa: B027 - optional
        """Handle keys that the user has pressed, none of them q."""


def require_terminal() -> None:
    """Raise a usage error unless standard output is a terminal."""
    if not sys.stdout.isatty():
        raise click.UsageError("standard output is not a terminal (expected one, or --json)")


def show(view: View, interval: float) -> None:
    """Show ``view`` on the terminal, updated every ``interval`` seconds, until q or Ctrl-C."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    with _keys() as keyboard, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            view.update()
            due = time.monotonic() + interval
            while True:
                live.update(view.draw(*console.size), refresh=True)
                ready, _, _ = select.select(
                    [*keyboard, *view.sources], (), (), max(0.0, due - time.monotonic())
                )
                if not ready:
                    break
                if keyboard and keyboard[0] in ready:
                    pressed = os.read(keyboard[0], 64).decode(errors="ignore")
                    if not pressed or "q" in pressed:
                        return
                    view.press(pressed)
                if set(ready) & set(view.sources):
                    view.read_source()


@contextmanager
def _keys() -> Iterator[list[int]]:
    """Yield standard input, set to deliver each key at once and without echo.

    Yields an empty list if it is not a terminal.
    """
    if not sys.stdin.isatty():
        yield []
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield [fd]
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
