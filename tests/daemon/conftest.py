"""One vsockd for all the tests of a module, where starting one is not what they are about."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vsockets.testing import PrivateFabric, wait_until

from .raw_client import GUEST, assert_serves, compiled, no_descriptor_left_behind


class Fabrics:
    """The fabric in use.  One that a test has damaged is thrown away."""

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
    """For ``shared_fabric``."""
    fabrics = Fabrics()
    yield fabrics
    fabrics.end(PrivateFabric.stop)


@pytest.fixture
def shared_fabric(fabrics: Fabrics, request: pytest.FixtureRequest) -> Iterator[PrivateFabric]:
    """A fabric with a guest that is not new but as good as new, and must be so after the test.

    Others are served promptly before and after, vsockd holds no descriptor more than before,
    knows of no socket, and has logged no error.
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
    """A fabric that other users find the way to."""
    vsock_fabric.folder.parent.chmod(0o755)
    return vsock_fabric


@pytest.fixture(scope="module")
def programs() -> Iterator[Path]:
    """A folder that others may run ``door_client`` from."""
    with tempfile.TemporaryDirectory(prefix="vsock-", dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        compiled("door_client.c", Path(folder))
        yield Path(folder)
