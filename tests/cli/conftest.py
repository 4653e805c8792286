"""A fabric for each module, and ``vsock`` on it for each test."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import vsockets
from vsockets.testing import PrivateFabric

from .forwarding import Echo
from .vsock import Vsock


@pytest.fixture(scope="module")
def fabric() -> Iterator[PrivateFabric]:
    """A vsockd shared by the tests of a module."""
    with PrivateFabric() as fabric:
        yield fabric


@pytest.fixture
def vsock(fabric: PrivateFabric) -> Iterator[Vsock]:
    """The command line on the module's fabric; its processes are ended after the test."""
    with Vsock(fabric.folder) as vsock:
        yield vsock


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Vsock]:
    """The command line with a state folder of its own, in which vsockd is not running."""
    with Vsock(tmp_path / "state") as vsock:
        yield vsock
        vsock("down", expect=None)


@pytest.fixture(scope="module")
def echo(fabric: PrivateFabric) -> Iterator[int]:
    """The port of an echo service on the host."""
    address = (2, vsockets.VMADDR_PORT_ANY)
    with vsockets.create_server(address, backlog=1000, context=fabric.host) as server:
        Echo(server)
        yield server.getsockname()[1]


@pytest.fixture(scope="module")
def tcp_echo() -> Iterator[int]:
    """The port of an echo service over TCP."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        Echo(server)
        yield server.getsockname()[1]
