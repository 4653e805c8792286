"""ttrpc as Kata has it; by ``make test-examples``, because its libraries take long to compile."""

from __future__ import annotations

import os

import pytest

from vm import downloads

from .conftest import RunPage


@pytest.mark.timeout(240)  # 40 s of compiling libraries, the first time
def test_ttrpc(run_page: RunPage, go: dict[str, str], cargo: dict[str, str]) -> None:
    try:
        path = os.pathsep.join((go["GOPATH"], str(downloads.go_ttrpc())))
    except downloads.Unavailable as error:
        pytest.skip(f"no Go libraries: {error}")
    run_page("ttrpc", **{**go, **cargo, "GOPATH": path})
