"""Test messages: the sender, a number, the sender's connection, and a digest."""

import hashlib
import struct

_HEAD = struct.Struct(">BII")


def message(sender: int, number: int, connection: int) -> bytes:
    """Return message ``number`` of a sender; ``connection`` counts the sender's connects."""
    head = _HEAD.pack(sender, number, connection)
    return head + hashlib.sha256(head).digest()


def read(data: bytes) -> tuple[int, int, int]:
    """Return the sender, the number and the connection of a message.

    Raises ValueError when the message is corrupted.
    """
    sender, number, connection = _HEAD.unpack_from(data)
    if message(sender, number, connection) != data:
        raise ValueError(f"a corrupted message of {len(data)} bytes")
    return sender, number, connection
