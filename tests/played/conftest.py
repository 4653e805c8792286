"""A fabric for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vsockets.testing import PrivateFabric


@pytest.fixture(scope="module")
def fabric() -> Iterator[PrivateFabric]:
    with PrivateFabric() as fabric:
        yield fabric
