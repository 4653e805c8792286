"""Proxies for each test; RabbitMQ is shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vsockets.testing import PrivateFabric

from .stage import Proxies


@pytest.fixture
def proxies(vsock_fabric: PrivateFabric) -> Iterator[Proxies]:
    with Proxies(vsock_fabric) as proxies:
        yield proxies
