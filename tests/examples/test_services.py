"""Services and their clients, as the examples' pages have readers run them."""

from __future__ import annotations

import pytest

from .conftest import RunPage


def test_adapters(run_page: RunPage) -> None:
    for library in ("httpx", "uvicorn"):
        pytest.importorskip(library, reason=f"needs {library}")
    run_page("adapters")
