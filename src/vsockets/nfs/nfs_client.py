"""The NFS and MOUNT calls of a client in an asyncio loop, and its uncommitted writes.

The replies to WRITE and COMMIT contain the write verifier of the server process (RFC 1813 4.8).
Data whose verifier differs from that of the COMMIT may be lost, and is written again.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import platform
import secrets
from typing import Any, NamedTuple

from . import mount_protocol, nfs3, rpc
from .limits import NFS_CALL_TIMEOUT_SECONDS, NFS_RETRY_FIRST_SECONDS, NFS_UNCOMMITTED_MAX_BYTES
from .nfs3 import NUMBERS, PROCEDURES, Attributes, StableHow, Status
from .rpc import Auth, AuthSys, Flavor
from .rpc_client import RpcClient
from .xdr import XdrError


@functools.lru_cache(maxsize=64)
def credentials(uid: int, gid: int, groups: tuple[int, ...] = ()) -> Auth:
    """Return AUTH_SYS credentials for a unix user."""
    machine = platform.node().encode()[:255]
    parameters = AuthSys(0, machine, uid, gid, groups[: rpc.GROUPS_MAX])
    return Auth(Flavor.SYS, rpc.auth_sys.pack(parameters))


async def mount_export(client: RpcClient, path: bytes) -> bytes:
    """Return the handle of an export's root directory.

    Raises OSError if the server refuses or does not answer.
    """
    arguments = mount_protocol.path.pack(path)
    own = credentials(os.geteuid(), os.getegid())
    data = await client.call(
        mount_protocol.PROGRAM, mount_protocol.VERSION, mount_protocol.MNT, arguments, own
    )
    try:
        status, granted = mount_protocol.mount_result.unpack(data)
    except XdrError as error:
        raise _malformed(error) from None
    if status != mount_protocol.MountStatus.OK:
        raise nfs3.status_error(status)
    handle = granted[0]
    assert isinstance(handle, bytes)
    return handle


class NfsClient:
    """The NFS procedures of one server.

    Every method raises OSError if the server refuses or does not answer.
    """

    def __init__(self, client: RpcClient, transfer: int = nfs3.DATA_SIZE) -> None:
        """Use ``client`` for calls; a READ or WRITE has at most ``transfer`` bytes."""
        self._client = client
        self.transfer = transfer
        self.changes = 0  #: number of completed calls of procedures that modify something

    async def negotiate(self, auth: Auth, root: bytes) -> None:
        """Limit the transfer size to what the server's FSINFO allows.

        A server that allows more than a datagram can hold is a stock server that expects TCP and is
        reached over UDP; the limit is then that of UDP.
        """
        info = await self.call(auth, "fsinfo", root)
        limit = min(info.read_max, info.write_max)
        if limit > nfs3.DATA_SIZE:
            limit = nfs3.UDP_DATA_SIZE
        self.transfer = max(512, min(self.transfer, limit))

    async def call(self, auth: Auth, name: str, *arguments: Any) -> Any:
        """Call a procedure and return its results; a single one is not wrapped in a tuple."""
        procedure = PROCEDURES[NUMBERS[name]]
        packed = procedure.arguments.pack(arguments[0] if len(arguments) == 1 else arguments)
        status, content = await self._call(procedure, NUMBERS[name], packed, auth)
        pauses = NFS_CALL_TIMEOUT_SECONDS / NFS_RETRY_FIRST_SECONDS
        while status == Status.JUKEBOX and pauses > 0:  # the server asks the client to retry later
            await asyncio.sleep(NFS_RETRY_FIRST_SECONDS)
            status, content = await self._call(procedure, NUMBERS[name], packed, auth)
            pauses -= 1
        if status != Status.OK:
            raise nfs3.status_error(status)
        return content

    async def _call(
        self, procedure: nfs3.Procedure, number: int, packed: bytes, auth: Auth
    ) -> tuple[int, Any]:
        try:
            data = await self._client.call(nfs3.PROGRAM, nfs3.VERSION, number, packed, auth)
        finally:
            self.changes += procedure.modifies
        try:
            return nfs3.decode_result(procedure, data)
        except XdrError as error:
            raise _malformed(error) from None

    async def create(
        self, auth: Auth, target: nfs3.Target, new: nfs3.NewAttributes, exclusive: bool
    ) -> Any:
        """Create a file (CREATE).

        ``exclusive`` fails if the file exists, unless an earlier attempt of this call created it.
        """
        if not exclusive:
            return await self.call(auth, "create", target, (nfs3.CreateMode.UNCHECKED, new))
        verifier = secrets.token_bytes(nfs3.VERIFIER_SIZE)
        handle, _, change = await self.call(
            auth, "create", target, (nfs3.CreateMode.EXCLUSIVE, verifier)
        )
        now = (nfs3.TimeHow.SERVER, None)  # EXCLUSIVE stores the verifier in the file's times
        change = await self.call(auth, "setattr", handle, new._replace(atime=now, mtime=now), None)
        return handle, change.after, nfs3.WccData()

    async def read(self, auth: Auth, handle: bytes, offset: int, size: int) -> bytes:
        """Read ``size`` bytes, or fewer at the end of the file, by READs in flight together."""
        if size <= self.transfer:
            return await self._read(auth, handle, offset, size)
        sizes = [min(self.transfer, size - at) for at in range(0, size, self.transfer)]
        reads = [
            self._read(auth, handle, offset + number * self.transfer, part_size)
            for number, part_size in enumerate(sizes)
        ]
        parts = await asyncio.gather(*reads)
        short = [len(part) < part_size for part, part_size in zip(parts, sizes, strict=True)]
        # A short part ends the data, even if the file has grown before the next part was read.
        return b"".join(parts[: short.index(True) + 1] if True in short else parts)

    async def _read(self, auth: Auth, handle: bytes, offset: int, size: int) -> bytes:
        """Read at most ``transfer`` bytes, in one READ if the server can."""
        parts: list[bytes] = []
        done = 0
        while done < size:
            _, _, end, part = await self.call(auth, "read", handle, offset + done, size - done)
            part = part[: size - done]
            parts.append(part)
            done += len(part)
            if end or not part:
                break
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def write(
        self, auth: Auth, handle: bytes, offset: int, data: bytes, stable: StableHow
    ) -> tuple[bytes, Attributes | None]:
        """Write all of ``data``, in one WRITE if possible.

        Returns the write verifier, and the file's attributes if the server reports them.
        """
        done, verifiers = 0, set[bytes]()
        while done < len(data):
            part = data[done:]
            change, count, _, verifier = await self.call(
                auth, "write", handle, offset + done, len(part), stable, part
            )
            if not 0 < count <= len(part):
                raise _malformed(XdrError(f"{count} bytes written (expected 1 to {len(part)})"))
            done += count
            verifiers.add(verifier)
            if len(verifiers) > 1:  # the server restarted: earlier unstable writes may be lost
                done, verifiers = 0, set()
        return verifiers.pop(), change.after


def _malformed(error: XdrError) -> OSError:
    return OSError(errno.EPROTO, f"malformed reply from the server: {error}")


class _Piece(NamedTuple):
    offset: int
    data: bytes
    verifier: bytes


class Received(NamedTuple):
    """Attributes that the server has sent."""

    attributes: Attributes
    received: float  #: by the loop's clock


class WriteBack:
    """The uncommitted writes of one file; those of a failed commit are kept."""

    def __init__(self, nfs: NfsClient, handle: bytes) -> None:
        self._nfs = nfs
        self._handle = handle
        self._pieces: list[_Piece] = []
        self._size = 0
        self._lock = asyncio.Lock()  # data written again must not overwrite newer data
        self._written: Received | None = None
        self._changes = 0  # the client's count after the call that ``_written`` is from

    @property
    def attributes(self) -> Received | None:
        """The file's attributes after the latest write, if no other call has changed anything."""
        return self._written if self._changes == self._nfs.changes else None

    async def write(self, auth: Auth, offset: int, data: bytes) -> None:
        """Write ``data``; commit if too much is uncommitted.

        Raises OSError if the server refuses or does not answer.
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

        Raises OSError if the server refuses or does not answer.
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
        expected = self._nfs.changes + 1
        verifier, attributes = await self._nfs.write(
            auth, self._handle, offset, data, StableHow.UNSTABLE
        )
        # Of two calls under way at once, the server may have performed either one last.
        if attributes is not None and self._nfs.changes == expected:
            self._written = Received(attributes, asyncio.get_running_loop().time())
            self._changes = expected
        return _Piece(offset, data, verifier)
