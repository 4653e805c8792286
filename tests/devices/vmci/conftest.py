from __future__ import annotations

from collections.abc import Iterator

import pytest

from .played_guest import PlayedGuest


@pytest.fixture
def guest() -> Iterator[PlayedGuest]:
    guest = PlayedGuest()
    guest.probe()
    yield guest
    guest.close()
