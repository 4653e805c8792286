"""The MOUNT protocol, version 3 (RFC 1813 appendix I), which returns the first handle."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

from . import rpc, xdr
from .nfs3 import HANDLE_SIZE, PATH_SIZE

PROGRAM, VERSION = 100005, 3
_NAME_SIZE, _MOST_EXPORTS, _MOST_GROUPS = 255, 1024, 1024


class Status(IntEnum):
    """The outcome of MNT (mountstat3)."""

    OK = 0
    PERM = 1
    NOENT = 2
    ACCES = 13
    NAMETOOLONG = 63


class Offer(NamedTuple):
    """An exported directory and the clients that may mount it, as text (exportnode)."""

    path: bytes
    groups: tuple[bytes, ...]


_path = xdr.opaque(PATH_SIZE)
_group = xdr.opaque(_NAME_SIZE)
_granted: xdr.Codec[tuple[Any, ...]] = xdr.structure(
    lambda *values: values, xdr.opaque(HANDLE_SIZE), xdr.array(xdr.uint, 8)
)
_mounted: xdr.Codec[tuple[Any, ...]] = xdr.structure(lambda *values: values, _group, _path)

path = _path
answer = xdr.union({Status.OK: _granted}, xdr.void)
offers = xdr.chain(xdr.structure(Offer, _path, xdr.chain(_group, _MOST_GROUPS)), _MOST_EXPORTS)
#: The clients that have mounted exports: always empty, as a server cannot know when they unmount.
mounts = xdr.chain(_mounted, _MOST_EXPORTS)

MNT, DUMP, UMNT, UMNTALL, EXPORT = 1, 2, 3, 4, 5


def grant(handle: bytes) -> bytes:
    """Return the result of MNT: a handle, and the accepted credential flavors."""
    return answer.pack((Status.OK, (handle, (rpc.Flavor.SYS, rpc.Flavor.NONE))))
