"""docs/internals/walks.md: each file of a walk exists, and is joined to one before it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .test_dependencies import MODULES, ours

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/internals/walks.md").read_text()

#: The files of each walk, in order, by its heading.
WALKS = {
    heading: re.findall(r"^\d+\. `(src/[\w/.]+)`", text, re.MULTILINE)
    for heading, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
}

#: How many files a walk has at most.
LONGEST = {
    "A stream's connect": 14,
    "A virtio packet": 8,
    "A VMCI datagram": 10,
    "A supervised connect": 12,
}


def name_of(path: str) -> str:
    """Return the module in a file."""
    return ".".join(Path(path).relative_to("src").with_suffix("").parts)


def imports_from(module: str, other: str) -> bool:
    """Return whether ``module`` imports ``other``, or the package that passes its names on."""
    package = other.rpartition(".")[0]
    return other in ours(module) or (package in ours(module) and other in ours(package))


def test_the_walks_of_the_page() -> None:
    assert WALKS.keys() == LONGEST.keys()


@pytest.mark.parametrize("heading", LONGEST)
def test_a_walk_is_a_path_through_the_imports(heading: str) -> None:
    files = WALKS[heading]
    assert 5 <= len(files) <= LONGEST[heading]
    before: list[str] = []
    for path in files:
        name = name_of(path)
        assert name in MODULES, f"{path}: no such file"
        if before:
            joined = any(imports_from(one, name) or imports_from(name, one) for one in before)
            assert joined, f"{path} neither imports a file before it nor is imported by one"
        before.append(name)
    assert len(set(before)) == len(before)
