"""The mechanical part of CONTRIBUTING.md's style guide: first words, and words that are avoided."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FILES = {
    str(path.relative_to(ROOT)): path
    for folder in ("src", "tests", "bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
}

#: A docstring does not begin with these: they make an indirect question, or a pronoun without an
#: antecedent.
FIRST_WORDS = re.compile(
    r"(What|Whether|Where|How|Who|Whose|When|Why|That|It|Its|They|Their|Ours|One of (them|those)"
    r"|All of (them|those)|There (is|are)|Those|Such|Nothing|Nobody|Somebody|Whatever|Whoever)\b"
)

#: Words for which the style guide has better ones.
AVOIDED = re.compile(
    r"\b(somebody|nobody|whoever|whatever|whom|anew|likewise|becomes? of|no more(?! than)|any more"
    r"|(is|are|was|were) (?-i:none)|gone|knocks?|doors?|henceforth|he|him|his|himself)\b",
    re.IGNORECASE,
)


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each docstring."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text is not None:
                yield node.body[0].lineno, text


def comments(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each comment."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def messages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each string of more than one word, docstrings apart."""
    known = {line for line, _ in docstrings(tree)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            continue
        if " " in node.value and "\n" not in node.value and node.lineno not in known:
            yield node.lineno, node.value


@pytest.mark.parametrize("name", FILES)
def test_docstrings_begin_with_what_they_describe(name: str) -> None:
    tree = ast.parse(FILES[name].read_text())
    found = [f"{name}:{line}: {text}" for line, text in docstrings(tree) if FIRST_WORDS.match(text)]
    assert found == []


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("src")])
def test_words_of_the_style_guide(name: str) -> None:
    text = FILES[name].read_text()
    tree = ast.parse(text)
    prose = (*docstrings(tree), *comments(text), *messages(tree))
    found = [
        f"{name}:{line}: {found[0]}" for line, said in prose for found in AVOIDED.finditer(said)
    ]
    assert found == []
