"""Frames and field tables, compared with pamqp's."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands, decode, encode, frame

from vsockets.amqp.frames import (
    CLOSE_OK,
    ConnectionMethod,
    FrameError,
    Reply,
    begins_connection,
    connection_close,
    connection_method,
    frame_size,
    table_end,
    table_names,
    whole_frames,
    with_integer,
)

from .strategies import commands_in, conversations, tables


@given(conversations, st.integers(0, 30))
def test_whole_frames_are_found_in_order(parts: list[bytes], missing: int) -> None:
    data = b"".join(parts)
    assert [one.end for one in whole_frames(data, 1000)][-1:] == [len(data)][: len(parts)]
    cut = data[: max(0, len(data) - missing)]
    found = list(whole_frames(cut, 1000))
    done = found[-1].end if found else 0
    assert b"".join(cut[one.start : one.end] for one in found) == cut[:done]
    assert frame_size(cut[done:]) == 0 or frame_size(cut[done:]) > len(cut) - done


@given(st.binary(max_size=200))
def test_invalid_bytes_are_refused_or_incomplete(data: bytes) -> None:
    try:
        for one in whole_frames(data, 100):
            assert 8 <= one.end - one.start <= 108
            assert data[one.end - 1] == 0xCE
    except FrameError:
        pass


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"GET / HT", r"type 71 \(expected 1, 2, 3 or 8\)"),
        (b"\x01\0\0\0\0\x10\0", r"4096 bytes \(expected 100 at most\)"),
        (b"\x08\0\0\0\0\0\0\xcf", r"end octet 0xcf \(expected 0xce\)"),
    ],
)
def test_frame_error_names_value_and_expectation(data: bytes, problem: str) -> None:
    with pytest.raises(FrameError, match=problem):
        list(whole_frames(data, 100))


def test_connection_methods_are_recognized() -> None:
    def method(data: bytes) -> int | None:
        (one,) = whole_frames(data, 1000)
        return connection_method(data, one)

    assert method(frame.marshal(commands.Connection.Open("/"), 0)) == ConnectionMethod.OPEN
    assert method(frame.marshal(commands.Connection.Open("/"), 1)) is None
    assert method(frame.marshal(commands.Channel.Close(200, "", 0, 0), 0)) is None
    assert method(b"\x01\0\0\0\0\0\x02\0\x0a\xce") is None
    assert method(CLOSE_OK) == ConnectionMethod.CLOSE_OK
    assert isinstance(commands_in(CLOSE_OK)[0], commands.Connection.CloseOk)
    assert begins_connection(frame.marshal(commands.Connection.Start(), 0))
    assert not begins_connection(frame.marshal(commands.Connection.Close(200, "", 0, 0), 0))
    assert not begins_connection(b"HTTP/1.1 400")


@given(st.sampled_from(Reply), st.text(max_size=400), st.sampled_from([0, *ConnectionMethod]))
def test_close_frame_is_readable_by_pamqp(reply: Reply, text: str, cause: int) -> None:
    (close,) = commands_in(connection_close(reply, text, cause))
    assert isinstance(close, commands.Connection.Close)
    assert (close.reply_code, close.class_id, close.method_id) == (reply, 10 if cause else 0, cause)
    assert f"{reply.name} - {text}".startswith(close.reply_text)
    assert len(close.reply_text) >= 60 or close.reply_text.endswith(text)


@given(tables, st.integers(0, 2**32 - 1))
def test_entry_is_added_to_a_table(table: dict[str, Any], value: int) -> None:
    table.pop("vsock_cid", None)
    data = encode.field_table(table)
    assert table_end(data + b"more") == len(data)
    assert sorted(table_names(data)) == sorted(name.encode() for name in table)
    more = with_integer(data, b"vsock_cid", value)
    assert table_names(more) == [*table_names(data), b"vsock_cid"]
    size, read = decode.field_table(more)
    assert size == len(more)
    assert read == {**decode.field_table(data)[1], "vsock_cid": value}


@given(st.binary(max_size=60))
def test_truncated_table_is_refused(data: bytes) -> None:
    table = len(data).to_bytes(4, "big") + data
    try:
        found = table_names(table)
    except FrameError:
        return
    assert sum(len(name) + 2 for name in found) <= len(data)
