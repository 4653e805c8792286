"""The messages of the tests: who sent it, its number, which connection it went by, and a digest."""

import hashlib
import struct

_HEAD = struct.Struct(">BII")


def message(sender: int, number: int, connection: int) -> bytes:
    """The ``number``-th of a sender; ``connection`` counts the times it had to connect."""
    head = _HEAD.pack(sender, number, connection)
    return head + hashlib.sha256(head).digest()


def read(data: bytes) -> tuple[int, int, int]:
    """Sender, number and connection.  Raises ValueError when it is not as it was sent."""
    sender, number, connection = _HEAD.unpack_from(data)
    if message(sender, number, connection) != data:
        raise ValueError(f"a message of {len(data)} bytes that nobody sent")
    return sender, number, connection
