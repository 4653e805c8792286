"""A vsockd shared by the tests of a module, and other fixtures."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vsockets.testing import PrivateFabric, wait_until

from .raw_client import GUEST, assert_serves, compiled, no_descriptor_left_behind


class Fabrics:
    """The shared fabric.  A fabric that a test has damaged is discarded."""

    def __init__(self) -> None:
        self._fabric: PrivateFabric | None = None

    def get(self) -> PrivateFabric:
        if self._fabric is None:
            self._fabric = PrivateFabric().__enter__()
            self._fabric.guest(GUEST)
        return self._fabric

    def end(self, how: Callable[[PrivateFabric], None]) -> None:
        fabric, self._fabric = self._fabric, None
        if fabric is not None:
            try:
                how(fabric)
            finally:
                fabric.expect_errors()  # the test that caused them has failed
                fabric.__exit__(None, None, None)


@pytest.fixture(scope="module")
def fabrics() -> Iterator[Fabrics]:
    """Yield the fabrics of ``shared_fabric``."""
    fabrics = Fabrics()
    yield fabrics
    fabrics.end(PrivateFabric.stop)


@pytest.fixture
def shared_fabric(fabrics: Fabrics, request: pytest.FixtureRequest) -> Iterator[PrivateFabric]:
    """Yield a fabric with a guest, without sockets of other tests; check that the test leaves none.

    Other clients are served promptly before and after; after the test vsockd has no more
    descriptors than before, knows no socket, and has logged no error.
    """
    fabric = fabrics.get()
    seen = len(fabric.log)
    try:
        assert_serves(fabric)
        with no_descriptor_left_behind(fabric):
            yield fabric
        assert_serves(fabric)
        wait_until(lambda: fabric.control.sockets() == [], "every socket to be forgotten")
        assert "vsockd: ERROR" not in fabric.log[seen:]
    except BaseException:
        fabrics.end(PrivateFabric.kill)
        raise
    finally:
        request.node.add_report_section("teardown", "vsockd", fabric.log[seen:])


@pytest.fixture
def fabric(vsock_fabric: PrivateFabric) -> PrivateFabric:
    """Yield a fabric whose folder other users can enter."""
    vsock_fabric.folder.parent.chmod(0o755)
    return vsock_fabric


@pytest.fixture(scope="module")
def programs() -> Iterator[Path]:
    """Yield a folder from which other users can run ``request_client``."""
    with tempfile.TemporaryDirectory(prefix="vsock-", dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        compiled("request_client.c", Path(folder))
        yield Path(folder)
