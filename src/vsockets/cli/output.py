"""Output of commands: tables that fit the terminal, JSON, and one-line messages."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..model.text import printable

if TYPE_CHECKING:
    from rich.table import Table

#: Width of a table that does not go to a terminal: programs need whole lines, in characters.
_UNLIMITED = 10_000

#: Longest bar of a table, and shortest bar that is still readable, in characters.
_LONGEST_BAR, _SHORTEST_BAR = 20, 4

#: Space between two columns, in characters.
_GAP = 2


class Column(NamedTuple):
    """Layout of one column of a table.

    In a narrow terminal, columns with ``least`` are narrowed first, then columns with ``spare``
    are omitted; the others are never cut, because a cut number misleads.
    """

    title: str
    right: bool = False  #: aligned to the right, for numbers
    whole: bool = True  #: cells are not wrapped
    from_width: int = 0  #: omitted from tables narrower than this, in characters
    least: int = 0  #: smallest width in characters if space is short; 0: never cut
    spare: int = 0  #: omitted if space is short, the largest number first; 0: never
    bar: bool = False  #: values from 0 to 1, drawn as bars in the remaining space


#: A command in a hint, such as ``(see: vsock ls)``; those that use no given state folder excepted.
_HINT = re.compile(r"(?<=[:,] vsock )(?=(context|down|events|guestinfo|ls|run|status|up)\b)")

_dir_option = ""


def give_folder_in_hints(folder: Path) -> None:
    """Insert ``--dir`` with ``folder`` into the commands that later messages name."""
    global _dir_option
    _dir_option = f"--dir {shlex.quote(os.fspath(folder))} "


def complain(text: str) -> None:
    """Print an error message on standard error, in one line that begins with ``vsock:``."""
    line = _HINT.sub(lambda _: _dir_option, " ".join(text.split()))
    print(f"vsock: {printable(line)}", file=sys.stderr, flush=True)


notice = complain  # progress, too, goes to standard error: standard output carries data


def print_json(value: Any) -> None:
    """Print ``value`` as indented JSON."""
    print(json.dumps(value, indent=2))


def print_table(
    columns: Sequence[Column], rows: Iterable[Sequence[object]], piped: int = _UNLIMITED
) -> None:
    """Print a table that fits the terminal, or ``$COLUMNS``.

    Without either its width is at most ``piped`` characters.  Cells may come from guests: they pass
    through :func:`vsockets.model.text.printable`.
    """
    from rich.console import Console

    fits = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if fits else piped, highlight=False)
    with console.capture() as capture:
        console.print(make_table(columns, rows, console.width))
    for line in capture.get().splitlines():
        print(line.rstrip())


def make_table(columns: Sequence[Column], rows: Iterable[Sequence[object]], width: int) -> Table:
    """Return a ``rich`` table of at most ``width`` characters.

    Cells pass through :func:`vsockets.model.text.printable`, as in :func:`print_table`.
    """
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    laid: list[tuple[Column, list[Any], int]] = []
    for column, *cells in zip(columns, *rows, strict=True):
        if width < column.from_width:
            continue
        if column.bar:
            laid.append((column._replace(least=_SHORTEST_BAR, spare=99), cells, _LONGEST_BAR))
            continue
        texts = [printable(str(cell)) for cell in cells]
        laid.append((column, texts, max(map(cell_len, [column.title, *texts]))))
    widths = _fit(laid, width)
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for (column, _, natural), chosen in zip(laid, widths, strict=True):
        if chosen:
            table.add_column(
                column.title,
                justify="right" if column.right else "left",
                no_wrap=column.whole,
                overflow="ellipsis" if column.whole else "fold",
                width=chosen if chosen < natural else None,
            )
    for number in range(len(rows)):
        cells = [
            "█" * max(1, round(chosen * texts[number])) if column.bar else texts[number]
            for (column, texts, _), chosen in zip(laid, widths, strict=True)
            if chosen
        ]
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in cells))
    return table


def _fit(laid: Sequence[tuple[Column, list[Any], int]], width: int) -> list[int]:
    """Return the width of each column in characters, 0 for an omitted one."""
    widths = [natural for _, _, natural in laid]
    # The least width of a column: prose is wrapped at 12 characters or more.
    needed = [
        min(natural, column.least or (natural if column.whole else 12))
        for column, _, natural in laid
    ]

    def excess(of: Sequence[int]) -> int:
        return sum(of) + _GAP * (sum(map(bool, of)) - 1) - width

    for at in sorted(range(len(laid)), key=lambda at: -laid[at][0].spare):
        if laid[at][0].spare and excess(needed) > 0:
            widths[at] = needed[at] = 0
    # The widest columns are narrowed first.
    while (too_much := excess(widths)) > 0:
        cuttable = [
            at for at, (column, _, _) in enumerate(laid) if widths[at] > needed[at] and column.least
        ]
        if not cuttable:
            break
        widest = max(cuttable, key=lambda at: widths[at])
        widths[widest] -= min(too_much, max(1, (widths[widest] - needed[widest]) // 2))
    return widths


#: Styles of words that mean success or failure, in the tables of all commands.
_STYLES = {"yes": "green", "ok": "green", "no": "yellow", "partly": "yellow", "FAILED": "bold red"}


def user_name(uid: int) -> str:
    """Return the name of a user, or the uid as text if it has no name."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
