"""A file of cached replies, which outlives the server process however the process ends.

The file has a fixed size, and its space is allocated when it is created: a guest that fills the
disk cannot make a write fail.  Each reply has a slot; a record is checked when it is read back.
Writes are not synchronised with the disk: the kernel has them when the process is killed, and may
lose them when the machine loses power.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import zlib
from pathlib import Path

from .limits import NFS_CACHED_REPLIES_MAX
from .retransmission import CachedReply

log = logging.getLogger("vsockets.nfs")

#: Bytes of a slot.  A source has up to 80; a reply up to 284, or 44 with a change of up to 315.
_SLOT = 512
#: The first slot: what the file is, and its version.
_MAGIC = b"vsock nfs replies 1\n".ljust(_SLOT, b"\0")
#: Checksum of the rest, sequence number from 1, xid, digest, sizes of source, reply and change.
_HEADER = struct.Struct(">IQIIHHH")


class ReplyJournal:
    """The slots of the file ``path``, which one server uses exclusively."""

    def __init__(self, path: Path, slots: int = NFS_CACHED_REPLIES_MAX) -> None:
        """Open or create the file.

        Without space on the disk the replies are lost with the process, which is logged.

        Raises OSError if the file is not a journal, or cannot be opened.
        """
        self._path = path
        self._slots = slots
        self._sequence = 0
        self._failing = False
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            found = os.pread(self._fd, _SLOT, 0)
            if found.strip(b"\0") and found != _MAGIC:
                problem = "not a journal of replies of this version (remove it, or move --state)"
                raise OSError(0, f"{path}: {problem}")
            self._allocate()
        except BaseException:
            os.close(self._fd)
            raise

    def _allocate(self) -> None:
        try:
            os.posix_fallocate(self._fd, 0, (self._slots + 1) * _SLOT)
            os.pwrite(self._fd, _MAGIC, 0)
        except OSError as error:
            self._note_failure(error)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def load(self) -> list[tuple[int, CachedReply]]:
        """Return the replies with their slots, oldest first."""
        records: list[tuple[int, int, CachedReply]] = []
        damaged = 0
        for slot in range(self._slots):
            data = os.pread(self._fd, _SLOT, (slot + 1) * _SLOT)
            if not data.strip(b"\0"):
                continue
            try:
                sequence, reply = _decode(data)
            except ValueError:
                damaged += 1
            else:
                records.append((sequence, slot, reply))
        if damaged:
            log.warning("%s: damaged replies ignored: %d", self._path, damaged)
        records.sort()
        if records:
            self._sequence = records[-1][0]
        return [(slot, reply) for _, slot, reply in records]

    def write(self, slot: int, reply: CachedReply) -> None:
        """Replace the reply in ``slot``."""
        self._sequence += 1
        self._put(slot, _encode(self._sequence, reply))

    def erase(self, slot: int) -> None:
        """Remove the reply in ``slot``."""
        self._put(slot, bytes(_SLOT))

    def _put(self, slot: int, data: bytes) -> None:
        try:
            os.pwrite(self._fd, data, (slot + 1) * _SLOT)
        except OSError as error:
            self._note_failure(error)

    def _note_failure(self, error: OSError) -> None:
        if not self._failing:
            text = "%s: %s; a call that is retransmitted after a crash may be performed twice"
            log.warning(text, self._path, error.strerror)
        self._failing = True


def _encode(sequence: int, cached: CachedReply) -> bytes:
    source = json.dumps(cached.source).encode()
    parts = source, cached.reply, cached.change
    header = _HEADER.pack(0, sequence, cached.xid, cached.digest, *map(len, parts))
    rest = b"".join((header[4:], *parts))
    assert len(rest) + 4 <= _SLOT, "reply of a cached call too long"
    return zlib.crc32(rest).to_bytes(4) + rest


def _decode(data: bytes) -> tuple[int, CachedReply]:
    """Return a record's sequence number and reply.

    Raises ValueError if the record is damaged.
    """
    if len(data) != _SLOT:
        raise ValueError("truncated")
    checksum, sequence, xid, digest, *sizes = _HEADER.unpack_from(data)
    end = _HEADER.size + sum(sizes)
    if end > _SLOT or zlib.crc32(data[4:end]) != checksum:
        raise ValueError("wrong checksum")
    parts = []
    place = _HEADER.size
    for size in sizes:
        parts.append(data[place : place + size])
        place += size
    source, reply, change = parts
    return sequence, CachedReply(tuple(json.loads(source)), xid, digest, reply, change)
