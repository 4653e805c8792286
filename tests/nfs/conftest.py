"""Fixtures for tests that mount exports."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from vsockets.testing import PrivateFabric

from .stage import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[tuple[PrivateFabric, Storage]]:
    with PrivateFabric() as fabric, contextlib.closing(Storage(fabric, tmp_path)) as storage:
        yield fabric, storage
