"""A fabric for each module, and ``vsock`` on it for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vsockets.testing import PrivateFabric

from .vsock import Vsock


@pytest.fixture(scope="module")
def fabric() -> Iterator[PrivateFabric]:
    """A vsockd that this module's tests share."""
    with PrivateFabric() as fabric:
        yield fabric


@pytest.fixture
def vsock(fabric: PrivateFabric) -> Iterator[Vsock]:
    """The command line on the module's fabric; what a test left running is ended."""
    with Vsock(fabric.folder) as vsock:
        yield vsock


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Vsock]:
    """The command line with a state folder of its own, in which no vsockd runs yet."""
    with Vsock(tmp_path / "state") as vsock:
        yield vsock
        vsock("down", expect=None)
