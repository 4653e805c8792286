"""The MOUNT protocol, version 3 (RFC 1813 appendix I), by which clients get an export's handle."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

from . import rpc, xdr
from .nfs3 import HANDLE_SIZE, PATH_SIZE

PROGRAM, VERSION = 100005, 3
_NAME_SIZE, _EXPORTS_MAX, _GROUPS_MAX = 255, 1024, 1024


class MountStatus(IntEnum):
    """The outcome of MNT (mountstat3)."""

    OK = 0
    PERM = 1
    NOENT = 2
    ACCES = 13
    NAMETOOLONG = 63


class ExportNode(NamedTuple):
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
mount_result = xdr.union({MountStatus.OK: _granted}, xdr.void)
export_list = xdr.chain(
    xdr.structure(ExportNode, _path, xdr.chain(_group, _GROUPS_MAX)), _EXPORTS_MAX
)
#: The clients that have mounted exports: always empty, as a server cannot know when they unmount.
mount_list = xdr.chain(_mounted, _EXPORTS_MAX)

MNT, DUMP, UMNT, UMNTALL, EXPORT = 1, 2, 3, 4, 5


def encode_granted(handle: bytes) -> bytes:
    """Return the result of MNT: a handle, and the accepted credential flavors."""
    return mount_result.pack((MountStatus.OK, (handle, (rpc.Flavor.SYS, rpc.Flavor.NONE))))
