"""Each example has a page, and a row in docs/examples.md that names its test."""

from __future__ import annotations

import re

import pytest

from .conftest import EXAMPLES, ROOT, pastes_of

FOLDERS = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir())
TABLE = (ROOT / "docs" / "examples.md").read_text()


@pytest.mark.parametrize("name", FOLDERS)
def test_an_example_has_a_short_page_and_a_row(name: str) -> None:
    page = EXAMPLES / name / "README.md"
    assert len(page.read_text().splitlines()) <= 60
    assert pastes_of(name)
    row = re.search(rf"\(\.\./examples/{name}/README\.md\).*", TABLE)
    tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row[0] if row else "")
    assert tests, f"docs/examples.md has no row of {name} with its test"
    for path, test in tests:
        assert f"def {test}(" in (ROOT / path).read_text()


def test_readme_and_the_documentation_lead_to_the_table() -> None:
    assert "(docs/examples.md)" in (ROOT / "README.md").read_text()
    assert "(examples.md)" in (ROOT / "docs" / "README.md").read_text()
