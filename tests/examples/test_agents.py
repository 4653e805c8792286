"""Agents in several languages, each with its suite, as their pages have readers run them."""

from __future__ import annotations

import shutil

import pytest

from c_compiler import require_compiler

from .conftest import RunPage


def test_python(run_page: RunPage) -> None:
    run_page("python")


def test_c(run_page: RunPage) -> None:
    require_compiler("cc")
    if shutil.which("make") is None:
        pytest.skip("no make: apt install what .ci/run does")
    run_page("c")
