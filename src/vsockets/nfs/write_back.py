"""Written data that may not be on the server's disk yet.

The replies to WRITE and COMMIT contain the write verifier of the server process (RFC 1813 4.8).
Data whose verifier differs from that of the COMMIT may be lost, and is written again.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from .limits import NFS_UNCOMMITTED_MAX_BYTES
from .nfs3 import StableHow
from .nfs_client import NfsClient
from .rpc import Auth


class _Piece(NamedTuple):
    offset: int
    data: bytes
    verifier: bytes


class WriteBack:
    """The uncommitted writes of one file; after an OSError they are kept."""

    def __init__(self, nfs: NfsClient, handle: bytes) -> None:
        self._nfs = nfs
        self._handle = handle
        self._pieces: list[_Piece] = []
        self._size = 0
        self._lock = asyncio.Lock()  # data written again must not overwrite newer data

    async def write(self, auth: Auth, offset: int, data: bytes) -> None:
        """Write ``data``; commit if too much is uncommitted.

        Raises OSError.
        """
        async with self._lock:
            size = self._nfs.transfer
            parts = [(offset + at, data[at : at + size]) for at in range(0, len(data), size)]
            tasks = [asyncio.ensure_future(self._write(auth, *part)) for part in parts]
            try:
                self._pieces += await asyncio.gather(*tasks)
            except OSError:
                await asyncio.wait(tasks)
                raise
            self._size += len(data)
            if self._size >= NFS_UNCOMMITTED_MAX_BYTES:
                await self._commit(auth)

    async def commit(self, auth: Auth) -> None:
        """Return when all written data is on the server's disk.

        Raises OSError.
        """
        async with self._lock:
            await self._commit(auth)

    async def _commit(self, auth: Auth) -> None:
        while self._pieces:
            _, verifier = await self._nfs.call(auth, "commit", self._handle, 0, 0)
            kept = 0
            while kept < len(self._pieces) and self._pieces[kept].verifier == verifier:
                kept += 1
            # From the first mismatch on: later pieces may overlap it.
            for number in range(kept, len(self._pieces)):
                piece = self._pieces[number]
                self._pieces[number] = await self._write(auth, piece.offset, piece.data)
            if kept == len(self._pieces):
                self._pieces.clear()
                self._size = 0

    async def _write(self, auth: Auth, offset: int, data: bytes) -> _Piece:
        verifier = await self._nfs.write(auth, self._handle, offset, data, StableHow.UNSTABLE)
        return _Piece(offset, data, verifier)
