from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.vmci_driver import PlayedGuest


@pytest.fixture
def guest() -> Iterator[PlayedGuest]:
    guest = PlayedGuest()
    guest.probe()
    yield guest
    guest.close()
