"""The pages of the documentation, as CommonMark with tables: links, headings, code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]

#: Every page that is part of the documentation.
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])


class Block(NamedTuple):
    """A fenced block of code."""

    line: int
    language: str
    text: str
    note: str  #: the HTML comment directly before it
    seen: tuple[str, ...]  #: code in the next paragraph if that begins with "You see"


def name_of(page: Path) -> str:
    """Return the page's name within the repository."""
    return str(page.relative_to(ROOT))


@cache
def _tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def _inline(page: Path) -> Iterator[tuple[int, Token]]:
    """Yield every part of running text, with its line."""
    for token in _tokens(page):
        for child in token.children or ():
            yield (token.map or [0])[0] + 1, child


def links(page: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the target of each link and picture."""
    for line, part in _inline(page):
        target = part.attrGet("href" if part.type == "link_open" else "src")
        if target is not None:
            yield line, str(target)


def words(page: Path) -> Iterator[tuple[int, str]]:
    """Yield the running text, code apart."""
    for line, part in _inline(page):
        if part.type == "text":
            yield line, part.content


def code(page: Path) -> Iterator[tuple[int, str]]:
    """Yield the code within the running text."""
    for line, part in _inline(page):
        if part.type == "code_inline":
            yield line, part.content


@cache
def anchors(page: Path) -> frozenset[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    tokens = _tokens(page)
    for before, token in pairwise(tokens):
        if before.type == "heading_open":
            parts = (part.content for part in token.children or ())
            anchor = re.sub(r"[^\w\- ]", "", "".join(parts).lower()).replace(" ", "-")
            count = found.get(anchor, 0)
            found[anchor] = count + 1
            if count:
                found[f"{anchor}-{count}"] = 1
    return frozenset(found)


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of code."""
    tokens = _tokens(page)
    note = ""
    for number, token in enumerate(tokens):
        if token.type == "html_block" and token.content.startswith("<!--"):
            note = " ".join(token.content.strip().removeprefix("<!--").removesuffix("-->").split())
        elif token.type == "fence":
            line = (token.map or [0])[0] + 1
            yield Block(line, token.info.strip(), token.content, note, _seen(tokens, number + 1))
            note = ""
        else:
            note = ""


def _seen(tokens: list[Token], number: int) -> tuple[str, ...]:
    following = [token for token in tokens[number : number + 2] if token.type == "inline"]
    for token in following:
        if token.content.startswith("You see `"):
            return tuple(re.findall(r"`([^`]+)`", token.content.partition(". ")[0]))
    return ()
