"""Names of datagram routes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockets.protocol import decode_route, decode_source, encode_source

u32 = st.integers(0, 2**32 - 1)
addresses = st.tuples(u32, u32)
serials = st.integers(0, 2**63)
LIFE = "00c0ffee00c0ffee"


@given(addresses, serials)
def test_decoded_source_equals_the_encoded_one(address: tuple[int, int], serial: int) -> None:
    assert decode_source(encode_source(address, LIFE, serial)) == address


@given(addresses, serials)
def test_name_is_abstract_and_fits_a_socket_address(address: tuple[int, int], serial: int) -> None:
    name = encode_source(address, LIFE, serial)
    assert name[:1] == b"\0"
    assert len(name) <= 108


def test_name_has_the_documented_layout() -> None:
    assert encode_source((3, 1024), LIFE, 255) == b"\0vsock:3:1024:00c0ffee00c0ffee:ff"


@given(addresses, serials, serials)
def test_names_with_different_serials_differ(
    address: tuple[int, int], one: int, other: int
) -> None:
    names = encode_source(address, LIFE, one), encode_source(address, LIFE, other)
    assert (names[0] == names[1]) == (one == other)


def is_made_by_encode(name: bytes) -> bool:
    source, port = decode_route(name)
    if source is None or max(source) >= 2**32:
        return False
    life, serial = name.split(b":")[3:5]
    return encode_source(source, life.decode(), int(serial, 16), port) == name


@given(
    st.binary(max_size=60)
    | st.from_regex(
        rb"\x00vsock:[0-9]{1,12}:[0-9]{1,12}:[0-9a-fA-F]{15,17}:[0-9a-fA-F]{1,8}\n?",
        fullmatch=True,
    )
)
def test_only_names_of_routes_decode_to_a_source(name: bytes) -> None:
    assert decode_source(name) is None or is_made_by_encode(name)


@pytest.mark.parametrize(
    "name",
    [
        None,
        "",
        "\0vsock:3:1024:00c0ffee00c0ffee:1",  # a name with a path is a str in Python
        b"",
        b"\0vsock:3:1024",
        b"\0vsock:3:1024:1",
        b"\0vsock:3:1024:00c0ffee00c0ffe:1",
        b"\0vsock:3:1024:00c0ffee00c0ffeef:1",
        b"\0vsock:3:1024:00C0FFEE00C0FFEE:1",
        b"\0vsock:3:1024:00c0ffee00c0ffee:",
        b"\0vsock:3:1024:00c0ffee00c0ffee:1 ",
        b"\0vsock:3:1024:00c0ffee00c0ffee:1\0",
        b"\0vsock:3:1024:00c0ffee00c0ffee:1\n",
        b"\0vsock:3:1024:00c0ffee00c0ffee:FF",
        b"\0vsock:03:1024:00c0ffee00c0ffee:1",
        b"\0vsock:3:+1024:00c0ffee00c0ffee:1",
        b"\0vsock:3:-1:00c0ffee00c0ffee:1",
        b"\0vsock:3::00c0ffee00c0ffee:1",
        b"\0vsock:4294967296:1024:00c0ffee00c0ffee:1",
        b"\0vsock:3:4294967296:00c0ffee00c0ffee:1",
        b"\0vsock:3:1024:00c0ffee00c0ffee:01",
        b"vsock:3:1024:00c0ffee00c0ffee:1",
        b"x\0vsock:3:1024:00c0ffee00c0ffee:1",
        bytearray(b"\0vsock:3:1024:00c0ffee00c0ffee:1"),
        ("\0vsock:3:1024:00c0ffee00c0ffee:1",),
    ],
)
def test_similar_names_decode_to_none(name: object) -> None:
    assert decode_source(name) is None


def test_name_of_a_route_can_have_a_destination_port() -> None:
    name = encode_source((3, 5000), LIFE, 255, 80)
    assert name == b"\0vsock:3:5000:00c0ffee00c0ffee:ff:80"
    assert decode_source(name) == (3, 5000)
    assert decode_route(name) == ((3, 5000), 80)
    assert decode_route(encode_source((3, 5000), LIFE, 255)) == ((3, 5000), None)
    assert decode_route(b"else") == (None, None)
    assert decode_route(name + b"0" * 10) == (None, None)
