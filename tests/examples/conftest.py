"""The folders of ``examples/``, each with the commands of its page."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pastes import pastes_of, run_paste

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

#: Runs the commands of an example's page that contain a word, with more environment variables:
#: (name, word, variables).
RunPage = Callable[..., None]


@pytest.fixture
def run_page(tmp_path: Path) -> RunPage:
    """Run a page's commands in a copy of its folder: they may leave files there."""

    def run(name: str, word: str = "", **environment: str) -> None:
        shutil.copytree(EXAMPLES / name, tmp_path / "examples" / name)
        pastes = pastes_of(EXAMPLES / name / "README.md")
        chosen = {paste: seen for paste, seen in pastes.items() if word in paste}
        assert chosen
        for paste, seen in chosen.items():
            run_paste(paste, seen, tmp_path, tmp_path, environment)

    return run
