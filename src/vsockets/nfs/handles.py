"""File handles: signed, so that a guest can only show what it was given.

A handle names an export, a file's inode and its time of birth, which tells it from a later file
with that inode.  It holds as long as the file is there, whatever it is called.
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
    """A file: ``export`` is the export's number, ``born`` and ``born_ns`` its time of birth."""

    export: int
    ino: int
    born: int
    born_ns: int

    def pack(self) -> bytes:
        """As bytes, which sort like nothing in particular."""
        return _LAYOUT.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Identifier:
        """The reverse of ``pack``."""
        return cls(*_LAYOUT.unpack(data))


class Signer:
    """Makes handles and checks them, with a key that only the server has."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def handle(self, identifier: Identifier) -> bytes:
        """Of a file."""
        packed = identifier.pack()
        return packed + self._tag(packed)

    def check(self, handle: bytes) -> Identifier:
        """The reverse.  Raises ValueError for a handle that we did not make."""
        packed, tag = handle[: _LAYOUT.size], handle[_LAYOUT.size :]
        if len(handle) != SIZE or not hmac.compare_digest(tag, self._tag(packed)):
            raise ValueError("not a handle of ours")
        return Identifier.unpack(packed)

    def number(self, what: bytes, context: bytes) -> int:
        """63 bits that depend on ``what``, and that nobody else can foresee."""
        tag = hashlib.blake2b(what, digest_size=8, key=self._key, person=context).digest()
        return int.from_bytes(tag) >> 1

    def _tag(self, packed: bytes) -> bytes:
        return hashlib.blake2b(
            packed, digest_size=_TAG_SIZE, key=self._key, person=b"handle"
        ).digest()
