"""Where bridges listen, and what they say when they cannot."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from vsockets.bridges.doors import open_door
from vsockets.locator import parse_locator
from vsockets.testing import PrivateFabric

NOBODY = 65_534


@pytest.fixture(scope="module")
def fabric() -> Iterator[PrivateFabric]:
    with PrivateFabric() as fabric:
        yield fabric


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
@pytest.mark.parametrize("address", ["vsock::22", "vsock-dgram::22"])
def test_a_reserved_port_needs_a_capability(fabric: PrivateFabric, address: str) -> None:
    os.seteuid(NOBODY)
    try:
        with pytest.raises(PermissionError) as caught:
            open_door(parse_locator(address), fabric.host)
    finally:
        os.seteuid(0)
    assert str(caught.value.strerror) == (
        f"cannot listen on {parse_locator(address)}: Permission denied"
        " (ports below 1024 need CAP_NET_BIND_SERVICE)"
    )
