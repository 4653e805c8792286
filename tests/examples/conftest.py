"""The folders of ``examples/``, each with the commands of its page."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pastes import pastes_of, run_paste

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

#: Runs all commands of an example's page with more environment variables: (name, variables).
RunPage = Callable[..., None]


@pytest.fixture
def run_page(tmp_path: Path) -> RunPage:
    """Run a page's commands in a copy of its folder: they may leave files there."""

    def run(name: str, **environment: str) -> None:
        shutil.copytree(EXAMPLES / name, tmp_path / "examples" / name)
        for paste, seen in pastes_of(EXAMPLES / name / "README.md").items():
            run_paste(paste, seen, tmp_path, tmp_path, environment)

    return run
