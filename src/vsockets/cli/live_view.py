"""Views that stay on the terminal and are drawn anew, until q or Ctrl-C."""

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
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

IntervalOption = Annotated[
    float, typer.Option(metavar="SECONDS", min=0.1, help="How often it is brought up to date.")
]


class View(ABC):
    """What is shown."""

    #: descriptors that have something to hear when they are readable
    sources: Sequence[int] = ()

    @abstractmethod
    def update(self) -> None:
        """Find out how things are now: once each interval."""

    @abstractmethod
    def draw(self, width: int, height: int) -> RenderableType:
        """What there is to see, as characters wide and lines high."""

    def hear(self) -> None:  # noqa: B027 - most views have no sources
        """One of ``sources`` is readable."""

    def press(self, keys: str) -> None:  # noqa: B027 - nor keys
        """The user has pressed keys, none of them q."""


def require_terminal(option: str) -> None:
    """A usage error unless somebody looks."""
    if not sys.stdout.isatty():
        raise typer.BadParameter(f"{option} is for a terminal; for programs there is --json")


def show(view: View, interval: float) -> None:
    """Show ``view`` until q or Ctrl-C."""
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
                    view.hear()


@contextmanager
def _keys() -> Iterator[list[int]]:
    """Standard input such that each key comes at once and is not echoed; empty if it is no
    terminal.
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
