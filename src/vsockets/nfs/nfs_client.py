"""The NFS and MOUNT calls of an asyncio client."""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import platform
import secrets
from typing import Any

from . import mount_protocol, nfs3, rpc
from .limits import NFS_CALL_TIMEOUT_SECONDS, NFS_RETRY_FIRST_SECONDS
from .nfs3 import NUMBERS, PROCEDURES, Stable, Status
from .rpc import Auth, AuthSys, Flavor
from .rpc_client import RpcClient
from .xdr import XdrError


@functools.lru_cache(maxsize=64)
def credentials(uid: int, gid: int, groups: tuple[int, ...] = ()) -> Auth:
    """Return AUTH_SYS credentials for a unix user."""
    machine = platform.node().encode()[:255]
    shown = AuthSys(0, machine, uid, gid, groups[: rpc.MOST_GROUPS])
    return Auth(Flavor.SYS, rpc.auth_sys.pack(shown))


async def mount_export(client: RpcClient, path: bytes) -> bytes:
    """Return the handle of an export's root directory.

    Raises OSError.
    """
    arguments = mount_protocol.path.pack(path)
    own = credentials(os.geteuid(), os.getegid())
    data = await client.call(
        mount_protocol.PROGRAM, mount_protocol.VERSION, mount_protocol.MNT, arguments, own
    )
    try:
        status, granted = mount_protocol.answer.unpack(data)
    except XdrError as error:
        raise _broken(error) from None
    if status != mount_protocol.Status.OK:
        raise nfs3.error_of(status)
    handle = granted[0]
    assert isinstance(handle, bytes)
    return handle


class NfsClient:
    """The NFS procedures of one server.  Every method raises OSError."""

    def __init__(self, client: RpcClient, transfer: int = nfs3.DATA_SIZE) -> None:
        """Use ``client`` for calls; a READ or WRITE has at most ``transfer`` bytes."""
        self._client = client
        self.transfer = transfer

    async def agree(self, who: Auth, root: bytes) -> None:
        """Limit the transfer size to what the server's FSINFO allows.

        A server that allows more than a datagram can hold does not know that its transport is
        datagrams: it is a stock server, reached over UDP, so the limit is UDP's.
        """
        info = await self.call(who, "fsinfo", root)
        most = min(info.read_most, info.write_most)
        if most > nfs3.DATA_SIZE:
            most = nfs3.UDP_DATA_SIZE
        self.transfer = max(512, min(self.transfer, most))

    async def call(self, who: Auth, name: str, *arguments: Any) -> Any:
        """Call a procedure and return its results; a single one is not wrapped in a tuple."""
        procedure = PROCEDURES[NUMBERS[name]]
        packed = procedure.arguments.pack(arguments[0] if len(arguments) == 1 else arguments)
        status, content = await self._call(procedure, NUMBERS[name], packed, who)
        pauses = NFS_CALL_TIMEOUT_SECONDS / NFS_RETRY_FIRST_SECONDS
        while status == Status.JUKEBOX and pauses > 0:  # the server asks the client to retry later
            await asyncio.sleep(NFS_RETRY_FIRST_SECONDS)
            status, content = await self._call(procedure, NUMBERS[name], packed, who)
            pauses -= 1
        if status != Status.OK:
            raise nfs3.error_of(status)
        return content

    async def _call(
        self, procedure: nfs3.Procedure, number: int, packed: bytes, who: Auth
    ) -> tuple[int, Any]:
        data = await self._client.call(nfs3.PROGRAM, nfs3.VERSION, number, packed, who)
        try:
            return nfs3.decode_result(procedure, data)
        except XdrError as error:
            raise _broken(error) from None

    async def create(
        self, who: Auth, target: nfs3.Target, new: nfs3.NewAttributes, exclusive: bool
    ) -> Any:
        """Create a file (CREATE).

        ``exclusive`` fails if the file exists, unless an earlier attempt of this call created it.
        """
        if not exclusive:
            return await self.call(who, "create", target, (nfs3.How.UNCHECKED, new))
        verifier = secrets.token_bytes(nfs3.VERIFIER_SIZE)
        handle, _, change = await self.call(who, "create", target, (nfs3.How.EXCLUSIVE, verifier))
        now = (nfs3.TimeHow.SERVER, None)  # EXCLUSIVE stores the verifier in the file's times
        change = await self.call(who, "setattr", handle, new._replace(atime=now, mtime=now), None)
        return handle, change.after, nfs3.Change()

    async def write(
        self, who: Auth, handle: bytes, offset: int, data: bytes, stable: Stable
    ) -> bytes:
        """Write all of ``data``, in one WRITE if possible, and return the write verifier."""
        done, lives = 0, set[bytes]()
        while done < len(data):
            part = data[done:]
            _, count, _, verifier = await self.call(
                who, "write", handle, offset + done, len(part), stable, part
            )
            if not 0 < count <= len(part):
                raise _broken(XdrError(f"{count} bytes written (expected 1 to {len(part)})"))
            done += count
            lives.add(verifier)
            if len(lives) > 1:  # the server restarted: earlier unstable writes may be lost
                done, lives = 0, set()
        return lives.pop()


def _broken(error: XdrError) -> OSError:
    return OSError(errno.EPROTO, f"malformed reply from the server: {error}")
