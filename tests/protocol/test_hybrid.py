"""Both roles of the hybrid vsock handshake, with input split at any position."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockets.limits import HYBRID_LINE_MAX_BYTES
from vsockets.protocol.hybrid import ClientHandshake, Connect, Line, ok_line, port_name

PORTS = st.integers(0, 2**32 - 1)
ROLES = st.sampled_from([Connect, partial(ClientHandshake, 1)])


def read(line: Line, data: bytes, cuts: list[int]) -> tuple[int | None, int]:
    """Feed ``data`` in pieces; return the port or the errno, and how many bytes were taken."""
    taken = 0
    try:
        for end in [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]:
            if line.port is None and end > taken:
                taken += line.take(data[taken:end])
        if line.port is None:
            line.take(b"")
    except OSError as error:
        return error.errno, -1
    return line.port, taken


@given(PORTS, st.binary(max_size=100), st.lists(st.integers(0, 200)))
def test_line_is_parsed_and_following_bytes_are_left(
    port: int, rest: bytes, cuts: list[int]
) -> None:
    for line, said in (
        (Connect(), ClientHandshake(port).request),
        (ClientHandshake(port), ok_line(port)),
    ):
        assert read(line, said + rest, cuts) == (port, len(said))


@given(ROLES, st.binary(max_size=60), st.lists(st.integers(0, 60)))
def test_result_is_independent_of_how_input_is_split(
    role: Callable[[], Line], data: bytes, cuts: list[int]
) -> None:
    assert read(role(), data, cuts) == read(role(), data, [])


NEARLY = st.lists(
    st.sampled_from(
        [b"CONNECT", b"OK", b" ", b"\n", b"\r", b"0", b"52", b"-1", b"\0", b"4294967296"]
    ),
    max_size=12,
).map(b"".join)


@given(ROLES, NEARLY, st.lists(st.integers(0, 60)))
def test_nearly_valid_line_is_independent_of_how_input_is_split(
    role: Callable[[], Line], data: bytes, cuts: list[int]
) -> None:
    assert read(role(), data, cuts) == read(role(), data, [])


@pytest.mark.parametrize("text", [b"connect 52\n", b"CONNECT 52\r\n", b"CONNECT  52 \n"])
def test_variants_that_other_implementations_accept_are_accepted(text: bytes) -> None:
    assert read(Connect(), text, []) == (52, len(text))


@pytest.mark.parametrize(
    "text",
    [
        *(b"\n", b"CONNECT\n", b"CONNECT \n", b"CONNECT x\n", b"CONNECT 1 2\n", b"CONNECT -1\n"),
        *(b"CONNECT 4294967296\n", b"OK 1\n", b"GET / HTTP/1.1\r\n", b"\0" * HYBRID_LINE_MAX_BYTES),
        *("CONNECT \u0665\n".encode(), b"CONNECT 52\0\n"),
    ],
)
def test_invalid_request_raises_eproto(text: bytes) -> None:
    assert read(Connect(), text, []) == (errno.EPROTO, -1)


def test_line_longer_than_the_limit_raises_eproto() -> None:
    line = Connect()
    for _ in range(HYBRID_LINE_MAX_BYTES - 1):
        assert line.take(b"1") == 1
    with pytest.raises(OSError, match="expected CONNECT and a number"):
        line.take(b"1")
    longest = ClientHandshake(2**32 - 1).request
    assert len(longest) < HYBRID_LINE_MAX_BYTES
    spaces = b"CONNECT" + b" " * (HYBRID_LINE_MAX_BYTES - 9) + b"5\n"
    assert len(spaces) == HYBRID_LINE_MAX_BYTES
    assert read(Connect(), spaces, []) == (5, HYBRID_LINE_MAX_BYTES)
    assert read(Connect(), b" " + spaces, []) == (errno.EPROTO, -1)


def test_port_name_appends_underscore_and_port() -> None:
    assert port_name("/run/v.sock", 52) == "/run/v.sock_52"
