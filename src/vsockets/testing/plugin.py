"""The pytest plugin: the fixture ``vsock_fabric``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .fabric import PrivateFabric


@pytest.fixture
def vsock_fabric(request: pytest.FixtureRequest) -> Iterator[PrivateFabric]:
    """A private, disposable fabric: a host, and as many guests as are asked for.

    Tests that run at the same time have one each.  vsockd's log is shown when the test fails;
    an error in it fails the test, unless it calls ``vsock_fabric.expect_errors()``.
    """
    with PrivateFabric() as fabric:
        try:
            yield fabric
        finally:
            request.node.add_report_section("teardown", "vsockd", fabric.log)
