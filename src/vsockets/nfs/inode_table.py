"""The files that the kernel knows of: a number of ours for each handle of the server's."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field

import pyfuse3

from . import nfs3
from .nfs3 import Attributes, FileType
from .nfs_client import NfsClient
from .rpc import Auth
from .write_back import WriteBack

#: For how long the kernel may believe what we said, in seconds.  Other guests see what is
#: written when they open the file (close-to-open, as NFS clients have it).
_BELIEF = 1.0

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
    """A file; ``opened`` counts who has it open here."""

    number: int
    handle: bytes
    uncommitted: WriteBack
    lookups: int = 0
    opened: int = 0
    #: Where a file is that was removed while it is open, and who removed it.
    aside: tuple[nfs3.Target, Auth] | None = field(default=None)
    #: What the kernel was last told of its content: size, and times of the last changes.
    told: tuple[int, nfs3.Time, nfs3.Time] | None = field(default=None)


class InodeTable:
    """All of them; the kernel says when it forgets one."""

    def __init__(self, nfs: NfsClient, root: bytes) -> None:
        self._nfs = nfs
        self._last = int(pyfuse3.ROOT_INODE)
        node = Inode(self._last, root, WriteBack(nfs, root))
        self._by_number = {node.number: node}
        self._by_handle = {root: node}

    def __getitem__(self, number: int) -> Inode:
        return self._by_number[number]

    def known(self, handle: bytes) -> Inode | None:
        """The node, if the kernel knows it."""
        return self._by_handle.get(handle)

    def meet(self, handle: bytes) -> Inode:
        """The node, which the kernel gets to know once more."""
        node = self._by_handle.get(handle)
        if node is None:
            self._last += 1
            node = Inode(self._last, handle, WriteBack(self._nfs, handle))
            self._by_number[node.number] = self._by_handle[handle] = node
        node.lookups += 1
        return node

    def forget(self, number: int, times: int) -> None:
        """The kernel has forgotten it ``times`` times."""
        node = self._by_number.get(number)
        if node is None or number == pyfuse3.ROOT_INODE:
            return
        node.lookups -= times
        if node.lookups <= 0:
            del self._by_number[number], self._by_handle[node.handle]


def content_of(attributes: Attributes) -> tuple[int, nfs3.Time, nfs3.Time]:
    """What changes when a file's content does."""
    return attributes.size, attributes.mtime, attributes.ctime


def entry_of(node: Inode, attributes: Attributes) -> pyfuse3.EntryAttributes:
    """What the kernel wants to know of a file, and now does."""
    node.told = content_of(attributes)
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = node.number
    entry.generation = 0
    entry.entry_timeout = entry.attr_timeout = _BELIEF
    kind = _MODES.get(FileType(attributes.kind), 0)
    entry.st_mode = kind | attributes.mode & 0o7777
    entry.st_nlink = attributes.nlink - (node.aside is not None)
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
