"""CHANGELOG.md has the form of Keep a Changelog 1.1.0."""

from __future__ import annotations

import datetime
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()

#: Headings of a version's changes, in their order.
KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]

#: Each version's heading and its text, the newest first.
VERSIONS = re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", CHANGELOG, re.MULTILINE | re.DOTALL)


def test_the_form_is_named_and_changes_that_are_not_released_come_first() -> None:
    assert CHANGELOG.startswith("# Changelog\n\n")
    assert "https://keepachangelog.com/en/1.1.0/" in CHANGELOG.partition("## ")[0]
    assert VERSIONS[0][0] == "[Unreleased]"


def test_released_versions_have_a_date_and_the_newest_is_the_projects() -> None:
    released = []
    for heading, _ in VERSIONS[1:]:
        found = re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})( \[YANKED\])?", heading)
        assert found, heading
        version = tuple(int(part) for part in found[1].split("."))
        released.append((datetime.date.fromisoformat(found[2]), version))
    assert released == sorted(released, reverse=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert not released or ".".join(map(str, released[0][1])) == project


def test_changes_stand_in_lists_under_the_kinds_in_their_order() -> None:
    for heading, text in VERSIONS:
        before, *parts = re.split(r"^### (.+)\n", text, flags=re.MULTILINE)
        assert not before.strip(), f"{heading}: text without a kind of change: {before}"
        kinds = parts[0::2]  # a merge of two branches easily leaves one twice
        assert kinds == [kind for kind in KINDS if kind in kinds], f"{heading}: {kinds}"
        for kind, changes in zip(kinds, parts[1::2], strict=True):
            *_, items = re.split(r"(?=^- )", f"\n{changes}", maxsplit=1, flags=re.MULTILINE)
            assert items.startswith("- "), f"{heading}, {kind}: empty"
            for line in filter(None, items.splitlines()):
                assert re.match(r"(- |  )\S", line), f"{heading}, {kind}: not in the list: {line}"


def test_lines_are_short_enough_to_read_and_items_have_one_level() -> None:
    for number, line in enumerate(CHANGELOG.splitlines(), 1):
        assert len(line) <= 120, f"CHANGELOG.md:{number}: {len(line)} characters"
        assert not re.match(r"\s+[-*] ", line), f"CHANGELOG.md:{number}: a list within a list"
