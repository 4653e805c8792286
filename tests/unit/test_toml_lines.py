"""Line numbers of TOML keys: every key that tomllib finds has the right one."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockets.toml import KeyPath, line_of, toml_lines


def paths(value: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Yield the path of every key and element in a document parsed by tomllib."""
    if isinstance(value, dict):
        inner: Any = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    else:
        return
    for name, item in inner:
        yield (*path, name)
        yield from paths(item, (*path, name))


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", {}),
        ("# a = 1\n\n", {}),
        ("a = 1", {("a",): 1}),
        ("\n# b = 1\na = 1 # b = 1\n", {("a",): 3}),
        ("[a]\n\nb = 1\n[c]\n", {("a",): 1, ("a", "b"): 3, ("c",): 4}),
        ("[ a . b ] # c\nd=1", {("a",): 1, ("a", "b"): 1, ("a", "b", "d"): 2}),
        ("[a.b]\n[a]", {("a",): 2, ("a", "b"): 1}),
        ("a.b = 1\na . c = 2", {("a",): 1, ("a", "b"): 1, ("a", "c"): 2}),
        (
            '"a.b" = 1\n\'c"\' = 2\n"\\u0064" = 3\n"" = 4',
            {("a.b",): 1, ('c"',): 2, ("d",): 3, ("",): 4},
        ),
        (
            "[[a]]\nb = 1\n[[a]]\nb = 2\n[a.c]\nd = 3\n[[a.e]]\n[[a]]",
            {
                ("a",): 1,
                ("a", 0): 1,
                ("a", 0, "b"): 2,
                ("a", 1): 3,
                ("a", 1, "b"): 4,
                ("a", 1, "c"): 5,
                ("a", 1, "c", "d"): 6,
                ("a", 1, "e"): 7,
                ("a", 1, "e", 0): 7,
                ("a", 2): 8,
            },
        ),
        (
            "a = [ 1,\n # 2,\n 3\n,]\nb = []",
            {("a",): 1, ("a", 0): 1, ("a", 1): 3, ("b",): 5},
        ),
        (
            "a = { b.c = 1, d = [\n2, { e = 3 }] }\nf = {}",
            {
                ("a",): 1,
                ("a", "b"): 1,
                ("a", "b", "c"): 1,
                ("a", "d"): 1,
                ("a", "d", 0): 2,
                ("a", "d", 1): 2,
                ("a", "d", 1, "e"): 2,
                ("f",): 3,
            },
        ),
        ('a = """\nb = 1\n\\""" c = 2\n"""\nd = 3', {("a",): 1, ("d",): 5}),
        ("a = '''\n[b]\n'''''\nc = 3", {("a",): 1, ("c",): 4}),
        ('a = """""" # "\nb = """"""""\nc = \'\'\'\'\'\'', {("a",): 1, ("b",): 2, ("c",): 3}),
        ('a = "[#\\"\\\\"\nb = \'\\\'\nc = ""', {("a",): 1, ("b",): 2, ("c",): 3}),
        ("a = 1979-05-27 07:32:00Z # b\nc = -inf\nd=0xf", None),
        ("a = [1.5,true,1979-05-27]\r\n\r\nb = '''\r\n'''\r\nc = 1\r\n", None),
    ],
)
def test_lines(text: str, lines: dict[KeyPath, int] | None) -> None:
    found = toml_lines(text)
    assert set(found) == set(paths(tomllib.loads(text)))
    assert lines is None or found == lines


def test_windows_line_ends_count_once() -> None:
    assert toml_lines("a = 1\r\n\r\nb = '''\r\n'''\r\nc = 1\r\n") == {
        ("a",): 1,
        ("b",): 3,
        ("c",): 5,
    }


def test_missing_key_has_the_line_of_its_table() -> None:
    lines = toml_lines("\n[a]\nb = 1\n[[c]]")
    assert line_of(lines, ("a", "b")) == 3
    assert line_of(lines, ("a", "x")) == 2
    assert line_of(lines, ("c", 0, "x", 5)) == 4
    assert line_of(lines, ("x",)) is None


# Generated documents, whose line numbers are counted while they are written.

names = st.one_of(
    st.from_regex(r"[A-Za-z0-9_-]{1,3}", fullmatch=True),
    st.text("ab.\"'\\ =[#é", max_size=4),
)
strings = st.text("ab\"'\\ =[]{}#,\né", max_size=8)


def basic(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


class Writer:
    """A writer of TOML in many spellings that records the line of each path."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.text = ""
        self.lines: dict[KeyPath, int] = {}

    def note(self, path: KeyPath) -> None:
        self.lines[path] = self.text.count("\n") + 1

    def name(self, name: str) -> str:
        spellings = [basic(name)]
        if name and all(c.isascii() and (c.isalnum() or c in "_-") for c in name):
            spellings += [name, f"'{name}'"]
        elif "'" not in name:
            spellings.append(f"'{name}'")
        return self.draw(st.sampled_from(spellings))

    def blanks(self) -> None:
        self.text += self.draw(st.sampled_from(["", "\n", "# [x]\n", "  ", '\t# "\n\n']))

    def pair(self, table: KeyPath, name: str, depth: int, inline: bool) -> None:
        self.note((*table, name))
        self.text += self.name(name) + self.draw(st.sampled_from(["=", " = ", "\t=  "]))
        self.value((*table, name), depth, inline)

    def value(self, path: KeyPath, depth: int, inline: bool) -> None:
        kind = self.draw(st.integers(0, 6 if depth else 4))
        text = self.draw(strings)
        if kind == 0:
            self.text += self.draw(
                st.sampled_from(
                    ["1", "-1_000", "0xff", "1e5", "true", "nan", "1979-05-27 07:32:00"]
                )
            )
        elif kind == 1:
            self.text += basic(text)
        elif kind == 2:
            self.text += "'" + text.replace("'", "").replace("\n", "") + "'"
        elif kind == 3 and not inline:
            self.text += '"""' + text.replace("\\", "\\\\").replace('"""', '""\\"') + 'x""""'
        elif kind == 4 and not inline:
            self.text += "'''" + text.replace("'''", "") + "x'''''"
        elif kind == 5:
            self.text += "["
            for index in range(self.draw(st.integers(0, 3))):
                self.text += "," if index else ""
                if not inline:
                    self.blanks()
                self.note((*path, index))
                self.value((*path, index), depth - 1, inline)
            self.text += "\n]" if not inline else "]"
        elif kind == 6:
            self.text += "{ "
            for index, name in enumerate(self.draw(st.lists(names, unique=True, max_size=3))):
                self.text += ", " if index else ""
                self.pair(path, name, depth - 1, True)
            self.text += " }"
        else:
            self.text += "1"

    def pairs(self, table: KeyPath) -> None:
        for name in self.draw(st.lists(names, unique=True, max_size=3)):
            self.blanks()
            self.pair(table, name, 2, False)
            self.text += self.draw(st.sampled_from(["\n", " # a = 1\n"]))


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, dict[KeyPath, int]]:
    writer = Writer(draw)
    for table in draw(st.lists(names, unique=True, max_size=4)):
        path: KeyPath = (f"table {table}",)
        header = writer.name(f"table {table}")
        if draw(st.booleans()):
            writer.blanks()
            writer.note(path)
            writer.text += f"[{header}]\n"
            writer.pairs(path)
        else:
            for index in range(draw(st.integers(1, 3))):
                writer.blanks()
                if index == 0:
                    writer.note(path)
                writer.note((*path, index))
                writer.text += f"[[ {header} ]]\n"
                writer.pairs((*path, index))
                if draw(st.booleans()):
                    writer.note((*path, index, "a table within"))
                    writer.text += f"[{header}.'a table within']\n"
                    writer.pairs((*path, index, "a table within"))
    return writer.text, writer.lines


@given(documents())
def test_keys_of_generated_documents_have_their_lines(
    document: tuple[str, dict[KeyPath, int]],
) -> None:
    text, lines = document
    assert set(paths(tomllib.loads(text))) == set(lines), "the writer writes what it says"
    assert toml_lines(text) == lines
    assert toml_lines(text.replace("\n", "\r\n")) == lines
