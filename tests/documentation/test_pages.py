"""Commands and programs of the documentation run as they are printed, or say why they do not.

A block of code is run by its language.  A comment directly before it changes that:

- ``<!-- not run: REASON -->``
- ``<!-- tested by tests/FILE.py::NAME -->``
- ``<!-- in the background -->``: the block's program runs until the end of the page.
- ``<!-- each line by itself -->``: each line is a command that ends, or is ended by Ctrl-C once it
  has printed something.  ``; not "TEXT": REASON`` leaves lines with TEXT out.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from vsockets.cli import app

from . import stage
from .markdown import PAGES, ROOT, Block, blocks, code, name_of

#: Languages whose blocks are run, and how.
MODES = {"sh": "script", "console": "console", "python": "python"}

#: Languages whose blocks are parsed.
PARSERS: dict[str, Callable[[str], object]] = {
    "toml": tomllib.loads,
    "json": json.loads,
    "yaml": yaml.safe_load,
}

#: Programs that pages use and a machine may lack.
PROGRAMS = ("cc", "curl", "gcc", "go", "socat", "ssh", "strace", "tshark")

WITH_CODE = [page for page in PAGES if any(blocks(page))]

#: Pages that this module runs; tests/examples runs the others, each with its libraries.
RUN = [page for page in WITH_CODE if not page.is_relative_to(ROOT / "examples")]

LINES = re.compile(r'each line by itself(?P<rest>(; not "[^"]+": [^;]+)*)')

#: Errors of a valid command line, on a machine without the files and users that it names.
ELSEWHERE = re.compile("no such file|directory not found|no such user|No such file")


def modified(note: str) -> bool:
    """Return whether a note says that the block is not run here."""
    return note.startswith(("not run: ", "tested by "))


def order(block: Block) -> dict[str, Any] | None:
    """Return what the stage has to do with a block; None if it is not run."""
    if block.language not in MODES or modified(block.note):
        return None
    mode, left_out = MODES[block.language], []
    if block.note == "in the background":
        mode = "background"
    elif found := LINES.fullmatch(block.note):
        mode, left_out = "lines", re.findall(r'not "([^"]+)"', found["rest"])
    return {**block._asdict(), "mode": mode, "left_out": left_out}


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    for block in blocks(page):
        where = f"{name_of(page)}:{block.line}"
        assert block.language, f"{where}: name the language of the block (text if it is none)"
        if found := re.fullmatch(r"tested by (tests/[\w/]+\.py)::(\w+)", block.note):
            tree = ast.parse((ROOT / found[1]).read_text())
            names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert found[2] in names, f"{where}: no such test"
        elif block.note.startswith("not run: "):
            assert len(block.note.split()) > 3, f"{where}: why is it not run?"
        elif block.language in MODES:
            known = block.note in {"", "in the background"} or LINES.fullmatch(block.note)
            assert known, f"{where}: unknown note: {block.note}"
        elif block.language in PARSERS:
            PARSERS[block.language](block.text)
        else:
            assert block.language == "text", f"{where}: nothing runs {block.language}: say why"


@functools.cache
def problem() -> str:
    """Return why no stage can be made here; empty if one can."""
    if shutil.which("unshare") is None:
        return "unshare is missing: apt install util-linux"
    done = subprocess.run([*command(), "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
    return done.stderr.decode().strip()


def command() -> tuple[str, ...]:
    """Return the command that enters the stage."""
    return stage.COMMAND if os.geteuid() == 0 else (*stage.COMMAND, *stage.AS_USER)


@pytest.mark.parametrize(
    "page", [page for page in RUN if any(map(order, blocks(page)))], ids=name_of
)
def test_commands_run_as_printed(page: Path) -> None:
    if problem():
        pytest.skip(f"needs namespaces: {problem()}")
    missing = {name for name in PROGRAMS if shutil.which(name) is None}
    orders, skipped = [], set()
    for one in filter(None, map(order, blocks(page))):
        needed = missing & set(re.findall(r"[\w-]+", one["text"]))
        skipped |= needed
        orders += [] if needed else [one]
    keep = [ROOT, Path(sys.prefix), Path(sys.base_prefix)]
    done = subprocess.run(
        [*command(), sys.executable, "-m", "documentation.stage"],
        input=json.dumps({"root": str(ROOT), "keep": list(map(str, keep)), "blocks": orders}),
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    problems = json.loads(done.stdout)
    assert problems == [], f"{name_of(page)}:\n" + "\n".join(problems)
    if skipped:
        pytest.skip(f"not all blocks ran; missing: {', '.join(sorted(skipped))}")


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each call of vsock in a script."""
    text = text.replace("\\\n", " ")
    for line in text.splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|&;()<>")
        lexer.whitespace_split = True
        lexer.commenters = "#"
        try:
            words = [*lexer, ";"]
        except ValueError:  # a quotation over several lines
            continue
        while ";" in words or "|" in words:
            end = next(
                number for number, word in enumerate(words) if re.fullmatch("[|&;()]+", word)
            )
            simple, words = words[:end], words[end + 1 :]
            if any(re.fullmatch("[<>]+", word) for word in simple):
                simple = simple[: next(n for n, w in enumerate(simple) if re.fullmatch("[<>]+", w))]
            if "vsock" in simple[:4]:
                yield simple[simple.index("vsock") + 1 :]


def parse(arguments: list[str]) -> None:
    """Parse a command line of vsock, and run nothing.  Raises click.UsageError."""
    command: click.Command = app.app
    context, name = None, "vsock"
    while True:
        context = command.make_context(name, arguments, parent=context)
        if not isinstance(command, click.Group):
            return
        rest = [*context._protected_args, *context.args]
        found, subcommand, arguments = command.resolve_command(context, rest)
        assert found is not None and subcommand is not None
        name, command = found, subcommand


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_options_and_arguments_are_valid(page: Path) -> None:
    """Also those of commands that are not run."""
    for block in blocks(page):
        if block.language in {"sh", "console"}:
            for words in commands(block.text):
                if any(word.startswith("--install-completion") for word in words):
                    continue
                try:
                    parse(words)
                except click.exceptions.Exit:
                    pass  # --help
                except click.UsageError as error:
                    if ELSEWHERE.search(error.format_message()):
                        continue
                    pytest.fail(f"{name_of(page)}:{block.line}: {words}: {error.format_message()}")


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_that_are_named_exist(page: Path) -> None:
    """Code in running text need not be complete: names of commands and options are compared."""
    for line, text in code(page):
        words = text.split()
        if words[:1] != ["vsock"]:
            continue
        command: click.Command = app.app
        known = {"--help"}
        context = click.Context(app.app)
        for word in words[1:]:
            if word == "--":
                break
            known |= {option for parameter in command.params for option in parameter.opts}
            known |= {o for parameter in command.params for o in parameter.secondary_opts}
            if word.startswith("--"):
                option = re.split(r"[=|\],.]", word)[0]
                assert option in known, f"{name_of(page)}:{line}: {text}: no option {option}"
            elif isinstance(command, click.Group) and re.fullmatch("[a-z-]+", word):
                found = command.get_command(context, word)
                assert found is not None, f"{name_of(page)}:{line}: {text}: no command {word}"
                command = found
