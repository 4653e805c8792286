"""The files known to the kernel: an inode number for each of the server's handles."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field

import pyfuse3

from . import nfs3
from .nfs3 import Attributes, FileType
from .nfs_client import NfsClient, WriteBack
from .rpc import Auth

#: Seconds for which the kernel may cache attributes and names.  Other guests see what was written
#: when they open the file (close-to-open consistency, as NFS clients provide).
_CACHE_SECONDS = 1.0

_MODES = {
    FileType.REGULAR: stat.S_IFREG,
    FileType.DIRECTORY: stat.S_IFDIR,
    FileType.BLOCK: stat.S_IFBLK,
    FileType.CHARACTER: stat.S_IFCHR,
    FileType.SYMLINK: stat.S_IFLNK,
    FileType.SOCKET: stat.S_IFSOCK,
    FileType.FIFO: stat.S_IFIFO,
}


@dataclass(slots=True)
class Inode:
    """A file known to the kernel; ``opened`` counts its open descriptors."""

    number: int
    handle: bytes
    write_back: WriteBack
    lookups: int = 0
    opened: int = 0
    #: The name of a file that was removed while open (silly rename), and the remover's credentials.
    silly_name: tuple[nfs3.Target, Auth] | None = field(default=None)
    #: The size, mtime and ctime last reported to the kernel, for checking its cache.
    reported: tuple[int, nfs3.Time, nfs3.Time] | None = field(default=None)


class InodeTable:
    """The inodes that the kernel knows, each until the kernel forgets it."""

    def __init__(self, nfs: NfsClient, root: bytes) -> None:
        self._nfs = nfs
        self._last = int(pyfuse3.ROOT_INODE)
        node = Inode(self._last, root, WriteBack(nfs, root))
        self._by_number = {node.number: node}
        self._by_handle = {root: node}

    def __getitem__(self, number: int) -> Inode:
        """Return the inode with the number ``number``.

        Raises KeyError.
        """
        return self._by_number[number]

    def get(self, handle: bytes) -> Inode | None:
        """Return the inode of a handle, if the kernel knows it."""
        return self._by_handle.get(handle)

    def acquire(self, handle: bytes) -> Inode:
        """Return the inode of a handle and count one more lookup of the kernel."""
        node = self._by_handle.get(handle)
        if node is None:
            self._last += 1
            node = Inode(self._last, handle, WriteBack(self._nfs, handle))
            self._by_number[node.number] = self._by_handle[handle] = node
        node.lookups += 1
        return node

    def forget(self, number: int, times: int) -> None:
        """Subtract ``times`` lookups by the kernel; remove the inode when none are left."""
        node = self._by_number.get(number)
        if node is None or number == pyfuse3.ROOT_INODE:
            return
        node.lookups -= times
        if node.lookups <= 0:
            del self._by_number[number], self._by_handle[node.handle]


def content_version(attributes: Attributes) -> tuple[int, nfs3.Time, nfs3.Time]:
    """Return the size, mtime and ctime, which change whenever a file's content changes."""
    return attributes.size, attributes.mtime, attributes.ctime


def entry_of(node: Inode, attributes: Attributes) -> pyfuse3.EntryAttributes:
    """Return the attributes of ``node`` for the kernel, and record them as reported."""
    node.reported = content_version(attributes)
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = node.number
    entry.generation = 0
    entry.entry_timeout = entry.attr_timeout = _CACHE_SECONDS
    kind = _MODES.get(FileType(attributes.kind), 0)
    entry.st_mode = kind | attributes.mode & 0o7777
    entry.st_nlink = attributes.nlink - (node.silly_name is not None)
    entry.st_uid, entry.st_gid = attributes.uid, attributes.gid
    entry.st_size = attributes.size
    entry.st_rdev = os.makedev(*attributes.rdev)
    entry.st_blksize = nfs3.DATA_SIZE
    entry.st_blocks = (attributes.used + 511) // 512
    entry.st_atime_ns = _nanoseconds(attributes.atime)
    entry.st_mtime_ns = _nanoseconds(attributes.mtime)
    entry.st_ctime_ns = _nanoseconds(attributes.ctime)
    return entry


def _nanoseconds(time: nfs3.Time) -> int:
    return time.seconds * 1_000_000_000 + time.nanoseconds
