"""What commands print: tables that fit the terminal, JSON, and one-line messages."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple

from ..text import printable

if TYPE_CHECKING:
    from rich.table import Table

#: The width of a table nobody looks at: what reads it wants whole lines.
_UNLIMITED = 10_000


class Column(NamedTuple):
    """How one column of a table is laid out."""

    title: str
    right: bool = False  #: numbers
    whole: bool = True  #: not broken over lines; the others give way when it gets tight
    from_width: int = 0  #: left out of tables that are narrower, in characters


def complain(text: str) -> None:
    """Say in one line on standard error what went wrong."""
    print(f"vsock: {printable(' '.join(text.split()))}", file=sys.stderr, flush=True)


notice = complain  # what went right is said in the same way, where standard output is data


def print_json(value: Any) -> None:
    """Print ``value`` for programs."""
    print(json.dumps(value, indent=2))


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[object]]) -> None:
    """Print a table that fits the terminal, or ``$COLUMNS``.  Cells are text, anybody's: see
    :func:`vsockets.text.printable`.
    """
    from rich.console import Console

    fits = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if fits else _UNLIMITED, highlight=False)
    with console.capture() as capture:
        console.print(make_table(columns, rows, console.width))
    for line in capture.get().splitlines():
        print(line.rstrip())


def make_table(columns: Sequence[Column], rows: Iterable[Sequence[object]], width: int) -> Table:
    """A table for ``rich``, ``width`` characters wide at most; cells as in :func:`print_table`."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    shown = [width >= column.from_width for column in columns]
    for column in compress(columns, shown):
        table.add_column(
            column.title,
            justify="right" if column.right else "left",
            no_wrap=column.whole,
            overflow="ellipsis" if column.whole else "fold",
        )
    for row in rows:
        cells = (printable(str(cell)) for cell in compress(row, shown))
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in cells))
    return table


#: Words that stand for good or bad news, in a table of any command.
_STYLES = {"yes": "green", "ok": "green", "no": "yellow", "partly": "yellow", "FAILED": "bold red"}


def user_name(uid: int) -> str:
    """The name of a user id, or the number where it has none."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
