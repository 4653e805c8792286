"""Field tables (AMQP 0-9-1, section 4.2.5.5): list the names, and add an entry.

The type letters are RabbitMQ's, some of which differ from the specification's.
"""

from __future__ import annotations

import struct

from .frames import FrameError

_LONG = struct.Struct(">I")
_SIGNED = struct.Struct(">q")

#: Size in bytes of a value by its type; values of the types in _WITH_LENGTH begin with their
#: length in four bytes.
_SIZES = {
    **dict.fromkeys(b"V", 0),
    **dict.fromkeys(b"tbB", 1),
    **dict.fromkeys(b"su", 2),
    **dict.fromkeys(b"Iif", 4),
    **dict.fromkeys(b"D", 5),
    **dict.fromkeys(b"lLdT", 8),
}
_WITH_LENGTH = b"SAFx"


def table_end(data: bytes) -> int:
    """Return the offset past the table at the start of ``data``.

    Raises FrameError when the table is incomplete.
    """
    if len(data) < _LONG.size:
        raise FrameError("a table without its length")
    end: int = _LONG.size + _LONG.unpack_from(data)[0]
    if end > len(data):
        raise FrameError("a table longer than its frame")
    return end


def names(table: bytes) -> list[bytes]:
    """Return the names in a table, which begins with its length; values are skipped.

    Raises FrameError.
    """
    found = []
    place, end = _LONG.size, len(table)
    while place < end:
        name_end = place + 1 + table[place]
        if name_end >= end:
            raise FrameError("a table with a truncated name")
        found.append(table[place + 1 : name_end])
        kind = table[name_end]
        place = name_end + 1
        if kind in _SIZES:
            place += _SIZES[kind]
        elif kind in _WITH_LENGTH and place + _LONG.size <= end:
            place += _LONG.size + _LONG.unpack_from(table, place)[0]
        else:
            raise FrameError(f"a table with a value of unknown type {bytes([kind])!r}")
    if place != end:
        raise FrameError("a table with a truncated value")
    return found


def with_number(table: bytes, name: bytes, value: int) -> bytes:
    """Return the table with a 64-bit integer entry appended."""
    entry = b"%c%bl%b" % (len(name), name, _SIGNED.pack(value))
    return _LONG.pack(len(table) - _LONG.size + len(entry)) + table[_LONG.size :] + entry
