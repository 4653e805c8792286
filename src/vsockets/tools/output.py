"""What commands print: tables that fit the terminal, JSON, and one-line messages."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

#: The width of a table nobody looks at: what reads it wants whole lines.
_UNLIMITED = 10_000


class Column(NamedTuple):
    """How one column of a table is laid out."""

    title: str
    right: bool = False  #: numbers
    whole: bool = True  #: not broken over lines; the others give way when it gets tight


def complain(text: str) -> None:
    """Say in one line on standard error what went wrong."""
    print(f"vsock: {' '.join(text.split())}", file=sys.stderr, flush=True)


notice = complain  # what went right is said in the same way, where standard output is data


class _Notices(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        notice(self.format(record))


def log_to_standard_error(name: str, verbose: bool) -> None:
    """Say in such lines what the logger ``name`` is told: warnings, or everything."""
    log = logging.getLogger(name)
    log.addHandler(_Notices())
    log.setLevel(logging.INFO if verbose else logging.WARNING)


def print_json(value: Any) -> None:
    """Print ``value`` for programs."""
    print(json.dumps(value, indent=2))


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[object]]) -> None:
    """Print a table that fits the terminal, or ``$COLUMNS``.  Cells are plain text."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    fits = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if fits else _UNLIMITED, highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(
            column.title,
            justify="right" if column.right else "left",
            no_wrap=column.whole,
            overflow="ellipsis" if column.whole else "fold",
        )
    for row in rows:
        table.add_row(*(Text(str(cell), style=_STYLES.get(str(cell), "")) for cell in row))
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        print(line.rstrip())


#: Words that stand for good or bad news, in a table of any command.
_STYLES = {"yes": "green", "ok": "green", "no": "yellow", "partly": "yellow", "FAILED": "bold red"}


def user_name(uid: int) -> str:
    """The name of a user id, or the number where it has none."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
