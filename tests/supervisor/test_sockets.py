"""The state kept of sockets, and the limit of it."""

from __future__ import annotations

from socket import SOCK_DGRAM, SOCK_STREAM

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockets.socket import Phase
from vsockets.supervisor.limits import SUPERVISOR_SOCKETS_MAX
from vsockets.supervisor.sockets import (
    SOCKADDR_SIZE,
    Endpoint,
    Sockets,
    inode_in,
    pack_address,
    unpack_address,
)

numbers = st.integers(0, (1 << 32) - 1)


@given(numbers, numbers)
def test_an_address_survives_packing(cid: int, port: int) -> None:
    packed = pack_address((cid, port))
    assert len(packed) == SOCKADDR_SIZE == 16
    assert unpack_address(packed) == (cid, port)


@pytest.mark.parametrize(
    ("changed", "valid"),
    [
        ({}, True),
        ({0: 1}, False),  # another family
        ({2: 7, 13: 7, 15: 7}, True),  # reserved fields
        ({12: 1}, True),  # VMADDR_FLAG_TO_HOST
        ({12: 2}, False),
        ({12: 255}, False),
    ],
)
def test_addresses_are_validated_as_by_linux(changed: dict[int, int], valid: bool) -> None:
    data = bytearray(pack_address((2, 5000)))
    for at, value in changed.items():
        data[at] = value
    assert unpack_address(bytes(data)) == ((2, 5000) if valid else None)
    assert unpack_address(bytes(data) + b"more") == ((2, 5000) if valid else None)
    assert unpack_address(bytes(data[:-1])) is None


def test_addresses_have_the_layout_of_linux() -> None:
    assert pack_address((2, 5000)).hex() == "28000000881300000200000000000000"


@pytest.mark.parametrize(
    ("link", "inode"),
    [
        ("socket:[4711]", 4711),
        ("socket:[]", None),
        ("pipe:[4711]", None),
        ("/tmp/socket:[4711]", None),
        ("", None),
    ],
)
def test_a_sockets_inode_is_read_from_its_link(link: str, inode: int | None) -> None:
    assert inode_in(link) == inode


def test_sockets_that_vsockd_does_not_know_are_kept_longer() -> None:
    sockets = Sockets()
    new = Endpoint(SOCK_STREAM, 1, 1)
    sockets.add(1, new)
    for inode in range(2, SUPERVISOR_SOCKETS_MAX + 3):
        connected = Endpoint(SOCK_STREAM, inode, inode)
        connected.phase = Phase.CONNECTED
        sockets.add(inode, connected)
    assert sockets.find(1) is new
    with pytest.raises(KeyError):
        sockets.find(2)


def test_the_number_of_sockets_is_bounded() -> None:
    sockets = Sockets()
    for inode in range(SUPERVISOR_SOCKETS_MAX + 100):
        sockets.add(inode, Endpoint(SOCK_DGRAM, inode, inode))
    known = 0
    for inode in range(SUPERVISOR_SOCKETS_MAX + 100):
        try:
            sockets.find(inode)
        except KeyError:
            continue
        known += 1
    assert known == SUPERVISOR_SOCKETS_MAX
