"""Answers of a kernel's AF_VSOCK, call by call and state by state: the table and how to take it.

``af_vsock.txt`` holds the answers of a real kernel, taken in a guest by ``programs/answers.c`` of
``tests/supervisor``; ``tests/vm`` takes them again, ``tests/supervisor`` and ``tests/library`` hold
the fabric's sockets to them.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("af_vsock.txt")
_PROGRAM = Path(__file__).parent / "supervisor" / "programs" / "answers.c"

#: The types of sockets, as the program calls them.
KINDS = ("stream", "seqpacket", "dgram")


class Cell(NamedTuple):
    """One call on a socket in one state."""

    kind: str
    call: str
    state: str


Answers = dict[Cell, str]


def compile_program(folder: Path) -> Path:
    """The program, static, so that it runs in any guest; OSError or CalledProcessError."""
    made = folder / "answers"
    command = ["gcc", "-static", "-O1", "-Wall", "-Werror", "-o", str(made), str(_PROGRAM)]
    subprocess.run(command, check=True)
    return made


def parse(printed: str) -> Answers:
    """The answers in the program's output."""
    found: Answers = {}
    for line in printed.splitlines():
        if line != "ready":
            kind, call, state, answer = line.split("\t")
            found[Cell(kind, call, state)] = answer
    return found


def render(answers: Mapping[Cell, str]) -> str:
    """The table as text: a line for each call, its answers, and the states that give each."""
    calls: dict[tuple[str, str], dict[str, list[str]]] = {}
    for cell, answer in answers.items():
        calls.setdefault((cell.kind, cell.call), {}).setdefault(answer, []).append(cell.state)
    lines = []
    section = ""
    for (kind, call), found in calls.items():
        if kind != section:
            section = kind
            lines.append(f"\n[{kind}]")
        parts = (f"{answer} ({' '.join(states)})" for answer, states in found.items())
        lines.append(f"{call}: {'; '.join(parts)}")
    return "\n".join(lines) + "\n"


def read_table(text: str | None = None) -> Answers:
    """The answers in the table, ``af_vsock.txt`` by default."""
    found: Answers = {}
    kind = ""
    for line in (TABLE.read_text() if text is None else text).splitlines():
        if line.startswith("["):
            kind = line.strip("[]")
        elif line and not line.startswith("#"):
            call, _, rest = line.partition(": ")
            for part in rest.split("; "):
                answer, _, states = part.rstrip(")").rpartition(" (")
                found.update({Cell(kind, call, state): answer for state in states.split()})
    return found


def differences(expected: Mapping[Cell, str], found: Mapping[Cell, str]) -> dict[Cell, str]:
    """The cells whose answers differ, and how."""
    cells: Iterable[Cell] = dict.fromkeys([*expected, *found])
    return {
        cell: f"{expected.get(cell, 'no cell')} -> {found.get(cell, 'no cell')}"
        for cell in cells
        if expected.get(cell) != found.get(cell)
    }
