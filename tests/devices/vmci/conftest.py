from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.vmci_driver import SimulatedGuest


@pytest.fixture
def guest() -> Iterator[SimulatedGuest]:
    guest = SimulatedGuest()
    guest.probe()
    yield guest
    guest.close()
