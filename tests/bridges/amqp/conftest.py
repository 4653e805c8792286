"""One RabbitMQ, of two nodes, for all tests of this folder; proxies for each test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from vm import downloads

from vsockets.testing import PrivateFabric
from vsockets.testing.rabbitmq import PrivateRabbitMQ

from .stage import Proxies


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[PrivateRabbitMQ]:
    with pytest.MonkeyPatch.context() as patch:
        try:
            patch.setenv("PATH", downloads.rabbitmq(), prepend=os.pathsep)
        except downloads.Unavailable as error:
            if os.environ.get("VSOCKETS_REQUIRE_VM"):
                raise
            pytest.skip(f"no RabbitMQ: {error}")
        with PrivateRabbitMQ(2, ("/", "orders")) as cluster:
            yield cluster


@pytest.fixture
def proxies(vsock_fabric: PrivateFabric) -> Iterator[Proxies]:
    with Proxies(vsock_fabric) as proxies:
        yield proxies
