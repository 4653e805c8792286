"""Validation of addresses, and the spellings of their two parts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockets import (
    VMADDR_CID_ANY,
    VMADDR_CID_HOST,
    VMADDR_CID_HYPERVISOR,
    VMADDR_CID_LOCAL,
    VMADDR_PORT_ANY,
)
from vsockets.model.address import check, parse_cid, parse_port

u32 = st.integers(0, 2**32 - 1)
any_integer = st.integers(-(2**70), 2**70)


@given(u32, u32)
def test_any_two_32_bit_numbers_are_an_address(cid: int, port: int) -> None:
    assert check((cid, port)) == (cid, port)


class Index:
    """An integer that is not an ``int``, like those of numpy."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __index__(self) -> int:
        return self._number


@given(any_integer, any_integer)
def test_integers_are_reduced_to_32_bits(cid: int, port: int) -> None:
    """CPython, Modules/socketmodule.c, getsockaddrarg(): PyArg_ParseTuple(args, "II", ...)."""
    expected = cid % 2**32, port % 2**32
    assert check((cid, port)) == check((Index(cid), Index(port))) == expected


def test_minus_one_is_any() -> None:
    assert check((-1, -1)) == (VMADDR_CID_ANY, VMADDR_PORT_ANY)


@pytest.mark.parametrize(
    "address",
    [
        None,
        5,
        "2:5000",
        b"25",
        (),
        (2,),
        (2, 5000, 0),
        [2, 5000],
        {2, 5000},
        (2, "5000"),
        ("2", 5000),
        (2.0, 5000),
        (2, 5000.0),
        (None, 5000),
        (2, None),
        ("localhost", 80),
    ],
)
def test_other_types_are_invalid(address: object) -> None:
    with pytest.raises(TypeError, match=r"vSockets address|integers"):
        check(address)


def test_index_objects_are_integers() -> None:
    assert repr(check((True, False))) == "(1, 0)"


@given(u32)
def test_spellings_of_numbers(number: int) -> None:
    for spelling in (str(number), hex(number), oct(number), f" {number} "):
        assert parse_cid(spelling) == number
        assert parse_port(spelling) == number


@pytest.mark.parametrize(
    ("name", "cid"),
    [
        ("hypervisor", VMADDR_CID_HYPERVISOR),
        ("local", VMADDR_CID_LOCAL),
        ("host", VMADDR_CID_HOST),
        ("any", VMADDR_CID_ANY),
        ("Host", VMADDR_CID_HOST),
    ],
)
def test_well_known_cids(name: str, cid: int) -> None:
    assert parse_cid(name) == cid


@pytest.mark.parametrize("name", ["any", "ANY"])
def test_any_port(name: str) -> None:
    assert parse_port(name) == VMADDR_PORT_ANY


@pytest.mark.parametrize(
    "text", ["", "-1", "4294967296", "0x100000000", "1.5", "ten", "3:5000", "09", "٣x"]
)
def test_texts_that_are_no_number(text: str) -> None:
    with pytest.raises(ValueError, match=r"CID .*expected a number from 0 to 4294967295 or hyp"):
        parse_cid(text)
    with pytest.raises(ValueError, match=r"port .*expected a number from 0 to 4294967295 or any"):
        parse_port(text)


@given(st.text())
def test_any_text_is_parsed_or_a_value_error(text: str) -> None:
    for parse in (parse_cid, parse_port):
        message = ""
        try:
            number = parse(text)
        except ValueError as error:
            message = str(error)
        assert repr(text) in message or 0 <= number < 2**32
