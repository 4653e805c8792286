"""ttrpc as Kata has it, and gRPC in Go.

``make test-examples`` runs these: their libraries are large and take long to compile.
"""

from __future__ import annotations

import os

import pytest

from vm import downloads

from .conftest import RunPage, fetched

#: The libraries take up to a minute to compile, the first time.
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def go_rpc(go: dict[str, str]) -> dict[str, str]:
    """The environment variables of a ``go`` that finds ttrpc and gRPC as well."""
    return {**go, "GOPATH": os.pathsep.join((go["GOPATH"], str(fetched(downloads.go_rpc))))}


def test_ttrpc(run_page: RunPage, go_rpc: dict[str, str], cargo: dict[str, str]) -> None:
    run_page("ttrpc", **go_rpc, **cargo)


def test_grpc_in_go(run_page: RunPage, go_rpc: dict[str, str]) -> None:
    run_page("grpc", "go test", **go_rpc)
