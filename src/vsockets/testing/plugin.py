"""The pytest plugin: the fixture ``vsock_fabric``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .fabric import PrivateFabric


@pytest.fixture
def vsock_fabric(request: pytest.FixtureRequest) -> Iterator[PrivateFabric]:
    """Provide a private fabric: a host, and any number of guests.

    Each test has its own, also in parallel runs.  vsockd's log is shown if the test fails; an
    error in the log fails the test, unless it calls ``vsock_fabric.expect_errors()``.
    """
    with PrivateFabric() as fabric:
        try:
            yield fabric
        finally:
            request.node.add_report_section("teardown", "vsockd", fabric.log)
