"""Links between the pages of the documentation lead somewhere, and so do names of files."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from . import markdown
from .markdown import PAGES, ROOT, name_of

#: Where else pages are named: messages, comments, recipes.
SOURCES = [
    path
    for pattern in ("src/**/*", "tests/**/*", "bench/*", "packaging/**/*", "examples/**/*", ".ci/*")
    for path in sorted(ROOT.glob(pattern))
    if path.suffix in {".py", ".c", ".h", ".go", ".rs", ".toml", ".service", ".yml", ".html", ""}
    and path.is_file()
]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for line, link in markdown.links(page):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / unquote(name)).resolve() if name else page
        assert target.exists(), f"line {line}: {link}: no such file"
        assert target.is_relative_to(ROOT), f"line {line}: {link}: outside the repository"
        if anchor:
            assert target in PAGES, f"line {line}: {link}: an anchor of what is no page"
            assert anchor in markdown.anchors(target), f"line {line}: {link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_link_is_left_as_text(page: Path) -> None:
    """A reference that is not defined is text with its brackets."""
    for line, text in markdown.words(page):
        assert not re.search(r"\]\[|\]\(", text), f"line {line}: {text}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    for line, text in markdown.code(page):
        found = re.match(r"(?:src|tests|docs|bench|examples|packaging)/[\w./*-]+", text)
        if found:
            name = found[0].rstrip(".").replace("NAME", "*")
            assert any(ROOT.glob(name.rstrip("/"))), f"line {line}: {name}: no such file"


def test_pages_that_sources_name_exist() -> None:
    missing = []
    for path in SOURCES:
        for name, anchor in re.findall(
            r"\b((?:docs/[\w/-]+|README|SECURITY|CONTRIBUTING)\.md)(?:#([\w-]+))?",
            path.read_text(errors="replace"),
        ):
            if not (ROOT / name).exists():
                missing.append(f"{name_of(path)}: {name}")
            elif anchor and anchor not in markdown.anchors(ROOT / name):
                missing.append(f"{name_of(path)}: {name}#{anchor}")
    assert missing == []


def test_every_page_is_in_the_index() -> None:
    """The site's navigation is made of docs/README.md."""
    index = ROOT / "docs/README.md"
    listed = {
        (index.parent / link.partition("#")[0]).resolve() for _, link in markdown.links(index)
    }
    assert [name_of(page) for page in PAGES if page not in {index, *listed}] == []
