"""The shell commands that README has its readers paste, as they are printed."""

from __future__ import annotations

from pathlib import Path

import pytest

import c_compiler
from pastes import pastes_of, run_paste

ROOT = Path(__file__).parents[2]
PASTES = pastes_of(ROOT / "README.md")


@pytest.mark.parametrize(("paste", "seen"), PASTES.items(), ids=PASTES.values())
def test_a_paste_shows_what_readme_promises(paste: str, seen: str, tmp_path: Path) -> None:
    c_compiler.require_compiler("gcc")
    run_paste(paste, seen, ROOT, tmp_path)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
