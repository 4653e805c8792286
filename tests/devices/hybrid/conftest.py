"""A fabric, a simulated Firecracker, and the device between them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vsockets.testing import PrivateFabric

from .simulated_firecracker import HybridDevice, SimulatedFirecracker


@pytest.fixture(scope="module")
def fabric() -> Iterator[PrivateFabric]:
    with PrivateFabric() as fabric:
        yield fabric


@pytest.fixture(scope="class")
def folder() -> Iterator[Path]:
    # Paths of unix sockets must be short.
    with tempfile.TemporaryDirectory(prefix="fc-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="class")
def firecracker(folder: Path) -> Iterator[SimulatedFirecracker]:
    played = SimulatedFirecracker(folder / "v.sock")
    played.power_on()
    yield played
    played.close()


@pytest.fixture(scope="class")
def device(fabric: PrivateFabric, firecracker: SimulatedFirecracker) -> Iterator[HybridDevice]:
    with HybridDevice(fabric, firecracker.path) as device:
        yield device
