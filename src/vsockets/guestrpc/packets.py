"""GuestRPC's packets, without input and output.

A packet is a 32-bit length of the rest and a list of fields, all numbers big-endian.  A field is a
32-bit type, a 32-bit name, and a value: for type 1, a 64-bit integer as its low half and then its
high half; for type 2, a 32-bit length of at least 1 and as many bytes.  Types 3 and 4, lists, are
in no known packet and are refused.  Source: open-vm-tools, ``lib/dataMap``, ``lib/rpcChannel``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from .limits import (
    GUESTRPC_FIELDS_MAX,
    GUESTRPC_PACKET_MAX_BYTES,
    GUESTRPC_SKIPPED_MAX_BYTES,
)

#: Ports at the hypervisor: the guest sends requests, the host sends commands.
RPCI_PORT, TCLO_PORT = 976, 975

_INTEGER, _STRING = 1, 2
_KIND, _PAYLOAD, _IS_LAST = 1, 2, 3
_DATA, _PING = 1, 2

_LENGTH = struct.Struct(">I")
_FIELD = struct.Struct(">II")
_VALUE = struct.Struct(">II")  # the halves of an integer, the low one first


class PacketError(ValueError):
    """A packet that is invalid; the connection cannot continue."""


@dataclass(frozen=True)
class Packet:
    """A decoded packet.

    ``payload`` is empty in a ping.  ``is_last`` is True in a request after which the guest closes
    the connection.  Of a packet that ``is_too_long`` the contents were skipped.
    """

    payload: bytes = b""
    is_ping: bool = False
    is_last: bool = False
    is_too_long: bool = False


def encode(payload: bytes, is_last: bool = False) -> bytes:
    """Return a packet with ``payload``, which must not be empty."""
    if not payload:
        raise ValueError("payload is empty, expected at least one byte")
    fields = _encode_integer(_KIND, _DATA)
    if is_last:
        fields += _encode_integer(_IS_LAST, 1)
    fields += _FIELD.pack(_STRING, _PAYLOAD) + _LENGTH.pack(len(payload)) + payload
    return _LENGTH.pack(len(fields)) + fields


def encode_ping() -> bytes:
    """Return a ping, which has no payload and no reply."""
    fields = _encode_integer(_KIND, _PING)
    return _LENGTH.pack(len(fields)) + fields


def _encode_integer(name: int, value: int) -> bytes:
    return _FIELD.pack(_INTEGER, name) + _VALUE.pack(value & 0xFFFF_FFFF, value >> 32)


def decode(fields: bytes) -> Packet:
    """Return the packet with these fields, the bytes after its length.

    Raises PacketError.
    """
    found: dict[int, int | bytes] = {}
    for name, value in _decode_fields(fields):
        if name in found:
            raise PacketError(f"field {name} is given twice, expected once")
        if len(found) == GUESTRPC_FIELDS_MAX:
            raise PacketError(f"more than {GUESTRPC_FIELDS_MAX} fields")
        found[name] = value
    kind, payload, is_last = found.get(_KIND), found.get(_PAYLOAD, b""), found.get(_IS_LAST, 0)
    if kind not in (_DATA, _PING):
        raise PacketError(f"kind {kind!r}, expected {_DATA} (data) or {_PING} (ping)")
    if not isinstance(payload, bytes) or not isinstance(is_last, int):
        raise PacketError(
            "the payload is an integer or the third field text, expected the opposite"
        )
    if kind == _DATA and not payload:
        raise PacketError("a data packet without payload")
    return Packet(payload if kind == _DATA else b"", kind == _PING, bool(is_last))


def _decode_fields(fields: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield names and values.  Raises PacketError."""
    at, end = 0, len(fields)
    while at < end:
        if end - at < _FIELD.size + _LENGTH.size:
            raise PacketError(f"{end - at} bytes left, expected a field")
        type_, name = _FIELD.unpack_from(fields, at)
        at += _FIELD.size
        if type_ == _INTEGER:
            if end - at < _VALUE.size:
                raise PacketError(f"{end - at} bytes left, expected an integer")
            low, high = _VALUE.unpack_from(fields, at)
            at += _VALUE.size
            # VGAuthService has the halves in the other order; all values that are known are small.
            yield name, high << 32 | low if low else high
        elif type_ == _STRING:
            (length,) = _LENGTH.unpack_from(fields, at)
            at += _LENGTH.size
            if not 0 < length <= end - at:
                raise PacketError(f"a string of {length} bytes, expected 1 to {end - at}")
            yield name, fields[at : at + length]
            at += length
        else:
            raise PacketError(f"field {name} has type {type_}, expected 1 or 2")


class Decoder:
    """The packets of a stream, from its bytes."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._skipped = 0  # bytes still to come of a packet that is too long

    @property
    def is_within(self) -> bool:
        """True while a packet has arrived in part."""
        return bool(self._buffer or self._skipped)

    def feed(self, data: bytes) -> Iterator[Packet]:
        """Yield the packets that are complete with ``data``.

        A packet of more than GUESTRPC_PACKET_MAX_BYTES is skipped without being kept: a guest that
        is disconnected while it sends is killed by SIGPIPE.

        Raises PacketError.
        """
        self._buffer += data
        while True:
            if self._skipped:
                skipped = min(self._skipped, len(self._buffer))
                del self._buffer[:skipped]
                self._skipped -= skipped
                if self._skipped:
                    return
                yield Packet(is_too_long=True)
            if len(self._buffer) < _LENGTH.size:
                return
            (length,) = _LENGTH.unpack_from(self._buffer)
            if not 0 < length <= GUESTRPC_SKIPPED_MAX_BYTES:
                expected = f"expected 1 to {GUESTRPC_SKIPPED_MAX_BYTES}"
                raise PacketError(f"a packet of {length} bytes, {expected}")
            end = _LENGTH.size + length
            if length > GUESTRPC_PACKET_MAX_BYTES:
                self._skipped = end
            elif len(self._buffer) < end:
                return
            else:
                fields = bytes(self._buffer[_LENGTH.size : end])
                del self._buffer[:end]
                yield decode(fields)
