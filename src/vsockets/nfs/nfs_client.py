"""NFS and MOUNT as an asyncio client's calls."""

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
    """What a unix process shows."""
    machine = platform.node().encode()[:255]
    shown = AuthSys(0, machine, uid, gid, groups[: rpc.MOST_GROUPS])
    return Auth(Flavor.SYS, rpc.auth_sys.pack(shown))


async def mount_export(client: RpcClient, path: bytes) -> bytes:
    """The handle of an export's root.  Raises OSError."""
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
    """One server's NFS.  Every call raises OSError."""

    def __init__(self, client: RpcClient, transfer: int = nfs3.DATA_SIZE) -> None:
        """``transfer`` is how many bytes a READ or WRITE has at most."""
        self._client = client
        self.transfer = transfer

    async def agree(self, who: Auth, root: bytes) -> None:
        """Ask how much the server takes at a time.

        One that would take more than any datagram holds does not know that datagrams are on
        the way, nor of which kind: a stock server, whose own are UDP's.
        """
        info = await self.call(who, "fsinfo", root)
        most = min(info.read_most, info.write_most)
        if most > nfs3.DATA_SIZE:
            most = nfs3.UDP_DATA_SIZE
        self.transfer = max(512, min(self.transfer, most))

    async def call(self, who: Auth, name: str, *arguments: Any) -> Any:
        """The results of a procedure; a single argument or result stands alone."""
        procedure = PROCEDURES[NUMBERS[name]]
        packed = procedure.arguments.pack(arguments[0] if len(arguments) == 1 else arguments)
        status, content = await self._call(procedure, NUMBERS[name], packed, who)
        pauses = NFS_CALL_TIMEOUT_SECONDS / NFS_RETRY_FIRST_SECONDS
        while status == Status.JUKEBOX and pauses > 0:  # it wants to be asked anew, in a while
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
        """CREATE; ``exclusive`` fails for a file that is there, but not for our own earlier try."""
        if not exclusive:
            return await self.call(who, "create", target, (nfs3.How.UNCHECKED, new))
        verifier = secrets.token_bytes(nfs3.VERIFIER_SIZE)
        handle, _, change = await self.call(who, "create", target, (nfs3.How.EXCLUSIVE, verifier))
        now = (nfs3.TimeHow.SERVER, None)  # the verifier is in them
        change = await self.call(who, "setattr", handle, new._replace(atime=now, mtime=now), None)
        return handle, change.after, nfs3.Change()

    async def write(
        self, who: Auth, handle: bytes, offset: int, data: bytes, stable: Stable
    ) -> bytes:
        """Write all of ``data``, in one piece if the server does; returns its verifier."""
        done, lives = 0, set[bytes]()
        while done < len(data):
            part = data[done:]
            _, count, _, verifier = await self.call(
                who, "write", handle, offset + done, len(part), stable, part
            )
            if not 0 < count <= len(part):
                raise _broken(XdrError(f"{count} bytes of {len(part)} were written"))
            done += count
            lives.add(verifier)
            if len(lives) > 1:  # what was written before the server's restart may be lost
                done, lives = 0, set()
        return lives.pop()


def _broken(error: XdrError) -> OSError:
    return OSError(errno.EPROTO, f"the server's answer is none: {error}")
