"""File handles, signed so that a guest cannot forge one.

A handle contains an export, the inode of a file and its birth time, which distinguishes the file
from a later one with the same inode.  It is valid
while the file exists, also under another name.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import NamedTuple

_LAYOUT = struct.Struct(">QQqI")
_TAG_SIZE = 16
SIZE = _LAYOUT.size + _TAG_SIZE
KEY_SIZE = 32


class Identifier(NamedTuple):
    """A file's identity: the number of its export, its inode, and its birth time."""

    export: int
    ino: int
    btime: int
    btime_ns: int

    def pack(self) -> bytes:
        """Encode as bytes.  The encoding does not preserve order."""
        return _LAYOUT.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Identifier:
        """Decode the result of ``pack``."""
        return cls(*_LAYOUT.unpack(data))


class Signer:
    """Creation and verification of handles, with a key known only to the server."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def sign(self, identifier: Identifier) -> bytes:
        """Return the handle of a file."""
        packed = identifier.pack()
        return packed + self._tag(packed)

    def verify(self, handle: bytes) -> Identifier:
        """Return the file that a handle identifies.

        Raises ValueError if the signature is invalid.
        """
        packed, tag = handle[: _LAYOUT.size], handle[_LAYOUT.size :]
        if len(handle) != SIZE or not hmac.compare_digest(tag, self._tag(packed)):
            raise ValueError("invalid handle")
        return Identifier.unpack(packed)

    def keyed_number(self, what: bytes, context: bytes) -> int:
        """Return a 63-bit number derived from ``what``, unpredictable without the key."""
        tag = hashlib.blake2b(what, digest_size=8, key=self._key, person=context).digest()
        return int.from_bytes(tag) >> 1

    def _tag(self, packed: bytes) -> bytes:
        return hashlib.blake2b(
            packed, digest_size=_TAG_SIZE, key=self._key, person=b"handle"
        ).digest()
