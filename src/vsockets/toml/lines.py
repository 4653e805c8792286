"""The line of each key in a TOML file, which tomllib does not report.

The text has been accepted by tomllib, so it is not checked again; this module only follows the
grammar of the TOML specification (version 1.0) and records where values begin.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right
from collections.abc import Mapping

#: Keys and, within arrays, indices from the document's root to a value.
Path = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*+")
_SPACES = re.compile(r"[ \t]*")
_STRING = re.compile(
    # The three quotes that end a multi-line string may follow one or two quotes of its text.
    r'''"""(?:[^\\]|\\.)*?""""{0,2} | \'\'\'.*?\'\'\'\'{0,2} | "(?:[^"\\]|\\.)*" | '[^']*' ''',
    re.DOTALL | re.VERBOSE,
)
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_OTHER_VALUE = re.compile(r"[^,\]}\#\n]*")


def line_of(lines: Mapping[Path, int], path: Path) -> int | None:
    """Return the line of ``path``, or of its nearest parent with a known line; else None."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path)


def toml_lines(text: str) -> dict[Path, int]:
    """Return the line, from 1, of every key and every array element in ``text``.

    A table's line is that of its header or, without a header, of its first key.  An array of tables
    has the line of its first header, and each element the line of the element's header.
    """
    return _Walk(text).lines


class _Walk:
    """One pass over a document."""

    def __init__(self, text: str) -> None:
        self.lines: dict[Path, int] = {}
        self._text = text
        self._at = 0
        self._ends = [match.start() for match in re.finditer("\n", text)]
        self._elements: dict[Path, int] = {}  # elements so far of each array of tables
        table: Path = ()
        self._skip(_BLANK)
        while self._at < len(text):
            if text[self._at] == "[":
                table = self._header()
            else:
                self._pair(table)
            self._skip(_BLANK)

    def _header(self) -> Path:
        start = self._at
        is_array = self._text.startswith("[[", start)
        self._at += 1 + is_array
        *outer, last = self._key()
        self._at += 1 + is_array
        table: Path = ()
        for name in outer:
            table = self._latest((*table, name))
            self._note(table, start, implied=True)
        table = (*table, last)
        if is_array:
            count = self._elements[table] = self._elements.get(table, 0) + 1
            self._note(table, start, implied=True)
            table = (*table, count - 1)
        self._note(table, start)
        return table

    def _latest(self, path: Path) -> Path:
        """Return ``path``; append the latest element's index if it is an array of tables."""
        return (*path, self._elements[path] - 1) if path in self._elements else path

    def _pair(self, table: Path) -> None:
        start = self._at
        *outer, last = self._key()
        for name in outer:
            table = (*table, name)
            self._note(table, start, implied=True)
        self._at += 1  # the equals sign
        self._skip(_SPACES)
        self._note((*table, last), start)
        self._value((*table, last))

    def _key(self) -> list[str]:
        """Read a dotted key, and the white space around it."""
        names = []
        while True:
            self._skip(_SPACES)
            if quoted := self._take(_STRING):
                names.append(str(tomllib.loads(f"key = {quoted}")["key"]))
            else:
                names.append(self._take(_BARE_KEY))
            self._skip(_SPACES)
            if not self._text.startswith(".", self._at):
                return names
            self._at += 1

    def _value(self, path: Path) -> None:
        opening = self._text[self._at]
        if opening in "[{":
            self._at += 1
            self._skip(_BLANK)
            index = 0
            while self._text[self._at] not in "]}":
                if opening == "{":
                    self._pair(path)
                else:
                    self._note((*path, index), self._at)
                    self._value((*path, index))
                    index += 1
                self._skip(_BLANK)
                if self._text[self._at] == ",":
                    self._at += 1
                    self._skip(_BLANK)
            self._at += 1
        elif not self._take(_STRING):
            self._take(_OTHER_VALUE)

    def _note(self, path: Path, at: int, implied: bool = False) -> None:
        """Record the line of position ``at`` for ``path``; ``implied`` keeps a recorded line."""
        if not (implied and path in self.lines):
            self.lines[path] = bisect_right(self._ends, at) + 1

    def _skip(self, pattern: re.Pattern[str]) -> None:
        self._take(pattern)

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        if match is None:
            return ""
        self._at = match.end()
        return match[0]
