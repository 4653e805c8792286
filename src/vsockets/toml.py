"""TOML files read with type checks; errors name file, line and key.

tomllib does not report lines.  :func:`toml_lines` finds the line of each key: of a text that
tomllib has accepted it only follows the grammar (TOML 1.0), and records where values begin.
"""

from __future__ import annotations

import re
import stat
import tomllib
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .limits import CONFIGURATION_FILE_MAX_BYTES

#: TOML guarantees 64-bit signed integers; Python reads larger ones.
LARGEST_INTEGER = (1 << 63) - 1

_KINDS = {
    bool: "a boolean",
    int: "an integer",
    float: "a float",
    str: "a string",
    list: "an array",
    dict: "a table",
    type(None): "null",
}
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]{1,60}")
_SYNTAX_ERROR = re.compile(r"(?P<problem>.*) \(at (?:line (?P<line>\d+), )?(?P<place>.*)\)")

#: Characters of a value shown in an error: enough to recognise it, on one line.
_LONGEST_SHOWN = 60


class ConfigurationError(ValueError):
    """An error in the configuration: ``FILE:LINE: KEY: problem, expected ...``.

    Line and key are left out where they do not apply.
    """

    def __init__(self, file: str, line: int | None, key: str, problem: str) -> None:
        where = file if line is None else f"{file}:{line}"
        super().__init__(": ".join(filter(None, [where, key, problem])))


@dataclass(frozen=True, slots=True)
class Table:
    """A table of a TOML file, or a JSON object that has no ``file``.

    A missing key has the value None; a missing table or array of tables is empty.
    """

    file: Path | None
    lines: Mapping[KeyPath, int]
    path: KeyPath  #: from the document's root
    values: Mapping[str, Any]

    def place(self, *inner: str | int) -> str:
        """Return ``FILE:LINE`` of the value at ``inner`` in this table; by default of the table."""
        line = line_of(self.lines, self.path + inner)
        return f"{self.file}:{line or 1}"

    def error(self, problem: str, *inner: str | int) -> ConfigurationError:
        """Return an error about the value at ``inner`` in this table; by default, the table."""
        path = self.path + inner
        key = ".".join(_spelled(name) for name in path if isinstance(name, str))
        if self.file is None:
            return ConfigurationError("", None, key, problem)
        line = line_of(self.lines, path)
        return ConfigurationError(str(self.file), line or 1, key, problem)

    def require_known(self, *known: str) -> None:
        """Raise ConfigurationError for a key that is not in ``known``."""
        for key in self.values:
            if key not in known:
                close = get_close_matches(key[:_LONGEST_SHOWN], known, 1)
                expected = f"expected {one_of(known)}" if known else "expected no key"
                hint = f"did you mean {close[0]}?" if close else expected
                raise self.error(f"unknown key, {hint}", key)

    def integer(self, key: str, lowest: int, highest: int = LARGEST_INTEGER) -> int | None:
        """Return the integer ``key``, from ``lowest`` to ``highest``."""
        number: int | None = self._value(key, int)
        if number is not None and not lowest <= number <= highest:
            expected = f"{lowest} to {highest}" if highest < LARGEST_INTEGER else f"from {lowest}"
            raise self.error(f"{shown(number)} is out of range, expected {expected}", key)
        return number

    def number(self, key: str) -> float | None:
        """Return the number ``key``, an integer or a float."""
        integer = self.values.get(key)
        if type(integer) is int:
            if abs(integer) > LARGEST_INTEGER:
                raise self.error(f"{shown(integer)} is out of range", key)
            return float(integer)
        number: float | None = self._value(key, float)
        return number

    def boolean(self, key: str) -> bool | None:
        """Return the boolean ``key``."""
        value: bool | None = self._value(key, bool)
        return value

    def text(self, key: str) -> str | None:
        """Return the string ``key``."""
        value: str | None = self._value(key, str)
        return value

    def choice(self, key: str, choices: Iterable[str]) -> str | None:
        """Return the string ``key``, one of ``choices``."""
        value = self.text(key)
        if value is not None and value not in choices:
            raise self.error(f"{shown(value)} is unknown, expected {one_of(choices)}", key)
        return value

    def texts(self, key: str) -> list[str] | None:
        """Return the array of strings ``key``."""
        values: list[Any] | None = self._value(key, list)
        for index, value in enumerate(values or ()):
            if not isinstance(value, str):
                raise self.error(f"{kind(value)}, expected a string", key, index)
        return values

    def table(self, key: str) -> Table:
        """Return the table ``key``."""
        return Table(self.file, self.lines, (*self.path, key), self._value(key, dict) or {})

    def tables(self, key: str) -> list[Table]:
        """Return the array of tables ``key``."""
        values = self.values.get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise self.error(f"{kind(values)}, expected tables, each headed [[{key}]]", key)
        return [
            Table(self.file, self.lines, (*self.path, key, index), value)
            for index, value in enumerate(values)
        ]

    def _value(self, key: str, expected: type) -> Any:
        value = self.values.get(key)
        # TOML booleans are not integers, unlike those of Python.
        if value is not None and type(value) is not expected:
            raise self.error(f"{kind(value)}, expected {_KINDS[expected]}", key)
        return value


def read_toml(path: Path) -> Table:
    """Return the root table of a file.

    Raises ConfigurationError when it cannot be read or is not TOML.
    """
    text = _read(path)
    try:
        values = tomllib.loads(text)
        lines = toml_lines(text)
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(path, text, str(error)) from error
    except (ValueError, RecursionError) as error:
        # What tomllib passes on from Python: integers of thousands of digits, deep nesting.
        raise ConfigurationError(str(path), None, "", f"not TOML: {error}") from error
    return Table(path, lines, (), values)


def _read(path: Path) -> str:
    name = str(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would block
            raise ConfigurationError(name, None, "", "not a regular file, expected a TOML file")
        with open(path, "rb") as file:
            data = file.read(CONFIGURATION_FILE_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(
            name, None, "", f"{error.strerror}, expected a TOML file"
        ) from error
    if len(data) > CONFIGURATION_FILE_MAX_BYTES:
        problem = f"more than {CONFIGURATION_FILE_MAX_BYTES} bytes, expected a TOML file"
        raise ConfigurationError(name, None, "", problem)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = f"byte {data[error.start]:#04x} is not text, expected UTF-8"
        raise ConfigurationError(name, line, "", problem) from error


def _syntax_error(path: Path, text: str, message: str) -> ConfigurationError:
    match = _SYNTAX_ERROR.fullmatch(message)
    if match is None:
        return ConfigurationError(str(path), None, "", f"not TOML: {message}")
    line = int(match["line"] or text.count("\n") + 1)
    return ConfigurationError(
        str(path), line, "", f"not TOML: {match['problem']} ({match['place']})"
    )


def one_of(choices: Iterable[str]) -> str:
    """Return the choices as text: ``a, b or c``."""
    *most, last = choices
    return f"{', '.join(most)} or {last}" if most else last


def kind(value: Any) -> str:
    """Describe a value's type, and the value itself if it is a scalar."""
    name = _KINDS.get(type(value), "a date or time")
    return f"{shown(value)} is {name}" if isinstance(value, str | int | float) else name


def shown(value: str | int | float) -> str:
    """Return a value as the file may spell it: on one line, and cut when it is long."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        return "a number of more than 64 bits"
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _spelled(key: str) -> str:
    return key if _PLAIN_KEY.fullmatch(key) else shown(key)


#: Keys and, within arrays, indices from the document's root to a value.
KeyPath = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*+")
_SPACES = re.compile(r"[ \t]*")
_STRING = re.compile(
    # The three quotes that end a multi-line string may follow one or two quotes of its text.
    r'''"""(?:[^\\]|\\.)*?""""{0,2} | \'\'\'.*?\'\'\'\'{0,2} | "(?:[^"\\]|\\.)*" | '[^']*' ''',
    re.DOTALL | re.VERBOSE,
)
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_OTHER_VALUE = re.compile(r"[^,\]}\#\n]*")


def line_of(lines: Mapping[KeyPath, int], path: KeyPath) -> int | None:
    """Return the line of ``path``, or of its nearest parent with a known line; else None."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path)


def toml_lines(text: str) -> dict[KeyPath, int]:
    """Return the line, from 1, of every key and every array element in ``text``.

    A table's line is that of its header or, without a header, of its first key.  An array of tables
    has the line of its first header, and each element the line of the element's header.
    """
    return _Walk(text).lines


class _Walk:
    """A scanner of a TOML document, which records the line of each key in :attr:`lines`."""

    def __init__(self, text: str) -> None:
        self.lines: dict[KeyPath, int] = {}
        self._text = text
        self._at = 0
        self._ends = [match.start() for match in re.finditer("\n", text)]
        self._elements: dict[KeyPath, int] = {}  # elements so far of each array of tables
        table: KeyPath = ()
        self._skip(_BLANK)
        while self._at < len(text):
            if text[self._at] == "[":
                table = self._header()
            else:
                self._pair(table)
            self._skip(_BLANK)

    def _header(self) -> KeyPath:
        start = self._at
        is_array = self._text.startswith("[[", start)
        self._at += 1 + is_array
        *outer, last = self._key()
        self._at += 1 + is_array
        table: KeyPath = ()
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

    def _latest(self, path: KeyPath) -> KeyPath:
        """Return ``path``, with its latest element's index if ``path`` is an array of tables."""
        return (*path, self._elements[path] - 1) if path in self._elements else path

    def _pair(self, table: KeyPath) -> None:
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

    def _value(self, path: KeyPath) -> None:
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

    def _note(self, path: KeyPath, at: int, implied: bool = False) -> None:
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
