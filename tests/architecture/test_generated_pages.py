"""The pages that docs/generate.py writes are up to date, and limits are named and explained."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["limits.md", "api.md"])
def test_the_page_is_up_to_date(generator: ModuleType, page: str) -> None:
    written = (DOCS / page).read_text()
    assert generator.PAGES[page]() == written, "run: .venv/bin/python docs/generate.py"


def test_every_limit_has_a_unit_and_a_reason(generator: ModuleType) -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]*) \|$", generator.limits_page(), re.M)
    assert len(rows) > 100
    for name, value, reason in rows:
        assert re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+", name), name
        assert len(reason.split()) > 3, f"{name} = {value} has no reason"


def test_every_public_name_is_explained(generator: ModuleType) -> None:
    empty = re.findall(r"^#+ `?([^`\n]+)`?\n\n(?=#|\Z)", generator.api_page(), re.M)
    assert empty == []
