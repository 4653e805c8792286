"""docs/security.md and docs/services.md say what is so: tests, rules, limits and fields exist."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

import vsockets
from vsockets.fabric import Limits, Rule
from vsockets.fabric.limits import AUDIT_LINES_PER_SECOND
from vsockets.testing import PrivateFabric

ROOT = Path(__file__).parents[2]
SECURITY = (ROOT / "docs" / "security.md").read_text()
CHAPTERS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", SECURITY, re.MULTILINE | re.DOTALL))

#: The table of the guide's sentences: (sentence, how it is read, the tests).
SENTENCES = re.findall(
    r'^\| ("[^|]+) \| ([^|]+) \|([^|]*)\|$',
    CHAPTERS["The guide, sentence by sentence"],
    re.MULTILINE,
)
SERVICES = (ROOT / "docs" / "services.md").read_text()
NAMED_TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", SECURITY + SERVICES)))


def rows(chapter: str) -> dict[str, str]:
    """The rows of the chapter's tables whose first cell is a name, and their second cells."""
    return dict(re.findall(r"^\| `(\w+)` \| ([^|]*?) ?\|", CHAPTERS[chapter], re.MULTILINE))


@pytest.mark.parametrize(("path", "name"), NAMED_TESTS, ids=lambda part: part)
def test_every_test_that_is_named_exists(path: str, name: str) -> None:
    tree = ast.parse((ROOT / path).read_text())
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_sentence_is_shown_or_has_nothing_to_do_with_us() -> None:
    table = CHAPTERS["The guide, sentence by sentence"]
    assert len(SENTENCES) == len(re.findall(r'^\| "', table, re.MULTILINE)) > 50
    for sentence, reading, tests in SENTENCES:
        named = re.findall(r"`tests/[^`]+::\w+`", tests)
        assert named or reading.startswith("not applicable: "), sentence
        assert tests.strip() == ", ".join(named), sentence


def test_what_survives_a_failure_is_shown() -> None:
    chapter = SERVICES.partition("## What survives which failure\n")[2].partition("\n## ")[0]
    promises = re.findall(r"^\|(?! what |---)(.*)\|$", chapter, re.MULTILINE)
    assert len(promises) > 15
    for promise in promises:
        *_, shown = promise.split("|")
        named = re.findall(r"`tests/[^`]+::\w+`", shown)
        assert named and shown.strip() == ", ".join(named), promise


def test_every_rule_is_named() -> None:
    named = re.findall(r"`([\w-]+)`", CHAPTERS["The audit"].partition("Rules: ")[2])
    assert {rule.value for rule in Rule} <= set(named)


def test_the_limits_and_their_defaults() -> None:
    told = {name: int(default) for name, default in rows("Limits").items()}
    assert told == dataclasses.asdict(Limits())
    assert f"at most {AUDIT_LINES_PER_SECOND} lines a second" in CHAPTERS["The audit"]


def test_the_fields_of_a_denial(vsock_fabric: PrivateFabric) -> None:
    guest, _ = vsock_fabric.guest(3), vsock_fabric.guest(4)
    with vsock_fabric.control.events("denial") as events:
        with pytest.raises(OSError):
            vsockets.create_connection((4, 5000), context=guest)
        event = events.wait(timeout=20)
    assert event.keys() == {*rows("The audit"), "topic", "time", "missed"}
