"""An export as a directory of this machine: FUSE operations performed by NFS calls.

The kernel names files by inode numbers: the inode table has one for each of the server's handles.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import secrets
import stat
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import pyfuse3

from . import nfs3
from .nfs3 import (
    VERIFIER_SIZE,
    Attributes,
    DeviceNumber,
    FileType,
    NewAttributes,
    Target,
    Time,
    TimeHow,
)
from .nfs_client import NfsClient, WriteBack, credentials
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

        Raises KeyError for an unknown number.
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


def entry_of(node: Inode, attributes: Attributes, age: float = 0.0) -> pyfuse3.EntryAttributes:
    """Return the attributes of ``node`` for the kernel, and record them as reported.

    ``age`` is the time since the server sent them, in seconds.
    """
    node.reported = content_version(attributes)
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = node.number
    entry.generation = 0
    entry.entry_timeout = _CACHE_SECONDS
    entry.attr_timeout = _CACHE_SECONDS - age
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


P = ParamSpec("P")
T = TypeVar("T")

_SPECIAL = {
    stat.S_IFCHR: FileType.CHARACTER,
    stat.S_IFBLK: FileType.BLOCK,
    stat.S_IFSOCK: FileType.SOCKET,
    stat.S_IFIFO: FileType.FIFO,
}

_SET_ID = stat.S_ISUID | stat.S_ISGID


def _reports_errors(method: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Decorate ``method`` so that its OSErrors are reported to the kernel."""

    @functools.wraps(method)
    async def report(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await method(*args, **kwargs)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None

    return report


def _credentials(context: pyfuse3.RequestContext) -> Auth:
    """Return the credentials of the process that sent a request."""
    groups: set[int] = set()
    if context.uid != 0:
        with contextlib.suppress(OSError):  # the process has ended
            groups = pyfuse3.get_sup_groups(context.pid)
    return credentials(context.uid, context.gid, tuple(sorted(groups - {context.gid})))


@dataclass(slots=True)
class _OpenFile:
    """An open file or directory, with the credentials of the process that opened it."""

    node: Inode
    auth: Auth
    verifier: bytes = bytes(VERIFIER_SIZE)  #: the verifier of a directory's cookies


class NfsOperations(pyfuse3.Operations):
    """The operations of a mounted export, as pyfuse3 defines them."""

    supports_dot_lookup = False
    enable_acl = False
    enable_writeback_cache = False

    def __init__(self, nfs: NfsClient, root: bytes) -> None:
        super().__init__()
        self._nfs = nfs
        self._nodes = InodeTable(nfs, root)
        self._open: dict[int, _OpenFile] = {}
        self._last_open = 0

    # Names

    @_reports_errors
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Return the entry of a name in a directory."""
        handle, attributes, _ = await self._look_up(
            _credentials(ctx), self._target(parent_inode, name)
        )
        return await self._entry(_credentials(ctx), handle, attributes)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Subtract the kernel's lookups: ``inode_list`` has (inode, number of lookups)."""
        for number, times in inode_list:
            self._nodes.forget(number, times)

    @_reports_errors
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Create a directory."""
        new = NewAttributes(mode=stat.S_IMODE(mode))
        target, auth = self._target(parent_inode, name), _credentials(ctx)
        return await self._made(auth, target, await self._nfs.call(auth, "mkdir", target, new))

    @_reports_errors
    async def symlink(
        self,
        parent_inode: int,
        name: bytes,
        target: bytes,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Create a symbolic link."""
        place, auth = self._target(parent_inode, name), _credentials(ctx)
        made = await self._nfs.call(auth, "symlink", place, NewAttributes(), bytes(target))
        return await self._made(auth, place, made)

    @_reports_errors
    async def mknod(
        self,
        parent_inode: int,
        name: bytes,
        mode: int,
        rdev: int,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Create a file, device, socket or FIFO."""
        target, auth = self._target(parent_inode, name), _credentials(ctx)
        new = NewAttributes(mode=stat.S_IMODE(mode))
        if stat.S_ISREG(mode):
            return await self._made(auth, target, await self._nfs.create(auth, target, new, True))
        kind = _SPECIAL.get(stat.S_IFMT(mode))
        if kind is None:
            raise OSError(errno.EINVAL, "unsupported file type")
        content: Any = new
        if kind in (FileType.CHARACTER, FileType.BLOCK):
            content = new, DeviceNumber(os.major(rdev), os.minor(rdev))
        made = await self._nfs.call(auth, "mknod", target, (kind, content))
        return await self._made(auth, target, made)

    @_reports_errors
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Remove a file; one that is open on this machine is renamed, and removed when closed."""
        target, auth = self._target(parent_inode, name), _credentials(ctx)
        if not await self._silly_rename(auth, target):
            await self._nfs.call(auth, "remove", *target)

    @_reports_errors
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Remove a directory."""
        await self._nfs.call(_credentials(ctx), "rmdir", *self._target(parent_inode, name))

    @_reports_errors
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        """Rename a file or directory; keep a replaced file that is open on this machine."""
        if flags:
            raise OSError(errno.EINVAL, "NFS does not support flags of rename")
        old, new = (
            self._target(parent_inode_old, name_old),
            self._target(parent_inode_new, name_new),
        )
        auth = _credentials(ctx)
        if old != new:
            await self._silly_rename(auth, new, unless=old)
        await self._nfs.call(auth, "rename", old, new)

    @_reports_errors
    async def link(
        self,
        inode: int,
        new_parent_inode: int,
        new_name: bytes,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Create a hard link."""
        node, auth = self._nodes[inode], _credentials(ctx)
        target = self._target(new_parent_inode, new_name)
        attributes, _ = await self._nfs.call(auth, "link", node.handle, target)
        return await self._entry(auth, node.handle, attributes)

    # Attributes

    @_reports_errors
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Return a file's attributes."""
        node = self._nodes[inode]
        # The kernel asks for them after each write, and the reply to the WRITE had them already.
        if (written := node.write_back.attributes) is not None:
            age = asyncio.get_running_loop().time() - written.received
            if age < _CACHE_SECONDS:
                return entry_of(node, written.attributes, age)
        return entry_of(node, await self._nfs.call(_credentials(ctx), "getattr", node.handle))

    @_reports_errors
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Set the attributes that ``fields`` names."""
        node, auth = self._nodes[inode], _credentials(ctx)
        new = NewAttributes(
            mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime=_time(fields.update_atime, attr.st_atime_ns),
            mtime=_time(fields.update_mtime, attr.st_mtime_ns),
        )
        if fh is not None:
            auth = self._open[fh].auth
        try:
            return entry_of(node, await self._set(auth, node, new))
        except PermissionError:
            if ctx.uid == 0:
                raise
            return entry_of(node, await self._set_for_non_owner(auth, node, new))

    @_reports_errors
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        """Return the target of a symbolic link."""
        _, path = await self._nfs.call(_credentials(ctx), "readlink", self._nodes[inode].handle)
        return bytes(path)

    @_reports_errors
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Return the capacity of the server's file system."""
        root = self._nodes[pyfuse3.ROOT_INODE].handle
        capacity = await self._nfs.call(_credentials(ctx), "fsstat", root)
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = block = 4096
        data.f_blocks, data.f_bfree = capacity.total // block, capacity.free // block
        data.f_bavail, data.f_files = capacity.available // block, capacity.files
        data.f_ffree, data.f_favail, data.f_namemax = (
            capacity.files_free,
            capacity.files_available,
            255,
        )
        return data

    # Open files

    @_reports_errors
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open a file; invalidate the kernel's cache if the file has changed since."""
        node, auth = self._nodes[inode], _credentials(ctx)
        if flags & os.O_TRUNC:
            attributes = await self._set(auth, node, NewAttributes(size=0))
        else:
            attributes = await self._nfs.call(auth, "getattr", node.handle)
        same = content_version(attributes) == node.reported
        if not same:  # the kernel's cache may predate another client's close
            pyfuse3.invalidate_inode(inode, attr_only=True)
        return pyfuse3.FileInfo(fh=self._opened(node, auth), keep_cache=same)

    @_reports_errors
    async def create(
        self,
        parent_inode: int,
        name: bytes,
        mode: int,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """Create and open a file."""
        target, auth = self._target(parent_inode, name), _credentials(ctx)
        new = NewAttributes(mode=stat.S_IMODE(mode), size=0 if flags & os.O_TRUNC else None)
        made = await self._nfs.create(auth, target, new, bool(flags & os.O_EXCL))
        entry = await self._made(auth, target, made)
        return pyfuse3.FileInfo(fh=self._opened(self._nodes[entry.st_ino], auth)), entry

    @_reports_errors
    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Read from an open file."""
        opened = self._open[fh]
        return await self._nfs.read(opened.auth, opened.node.handle, off, size)

    @_reports_errors
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write to an open file; the data may remain uncommitted until ``flush``."""
        opened = self._open[fh]
        await opened.node.write_back.write(opened.auth, off, bytes(buf))
        return len(buf)

    @_reports_errors
    async def flush(self, fh: int) -> None:
        """Commit written data when a descriptor is closed."""
        opened = self._open[fh]
        await opened.node.write_back.commit(opened.auth)

    @_reports_errors
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Commit written data."""
        opened = self._open[fh]
        await opened.node.write_back.commit(opened.auth)

    @_reports_errors
    async def release(self, fh: int) -> None:
        """Close a file; remove it if it was unlinked while open."""
        opened = self._open.pop(fh)
        node = opened.node
        try:
            await node.write_back.commit(opened.auth)  # written by a memory mapping since flush
        finally:
            node.opened -= 1
            if not node.opened and node.silly_name is not None:
                (target, auth), node.silly_name = node.silly_name, None
                await self._nfs.call(auth, "remove", *target)

    # Directories

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """Open a directory."""
        return self._opened(self._nodes[inode], _credentials(ctx))

    @_reports_errors
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List entries from the cookie ``start_id``."""
        opened = self._open[fh]
        cookie, end, room = start_id, False, self._nfs.transfer
        while not end:
            arguments = opened.node.handle, cookie, opened.verifier, room // 8, room
            _, opened.verifier, entries, end = await self._nfs.call(
                opened.auth, "readdirplus", *arguments
            )
            end = end or not entries
            for _, name, next_cookie, attributes, handle in entries:
                cookie = next_cookie
                if name in (b".", b".."):
                    continue
                if handle is None or attributes is None:
                    target = Target(opened.node.handle, name)
                    try:
                        handle, attributes, _ = await self._look_up(opened.auth, target)
                    except OSError:  # removed meanwhile
                        continue
                entry = await self._entry(opened.auth, handle, attributes)
                if not pyfuse3.readdir_reply(token, name, entry, cookie):
                    self._nodes.forget(entry.st_ino, 1)
                    return

    async def releasedir(self, fh: int) -> None:
        """Close a directory."""
        self._open.pop(fh).node.opened -= 1

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Do nothing: the server has changed the directory on disk before it replied."""

    def _target(self, folder: int, name: bytes) -> Target:
        return Target(self._nodes[folder].handle, bytes(name))

    def _opened(self, node: Inode, auth: Auth) -> int:
        self._last_open += 1
        self._open[self._last_open] = _OpenFile(node, auth)
        node.opened += 1
        return self._last_open

    async def _set(self, auth: Auth, node: Inode, new: NewAttributes) -> Attributes:
        if new.size is not None:  # otherwise a repeated write could extend the file again
            await node.write_back.commit(auth)
        change = await self._nfs.call(auth, "setattr", node.handle, new, None)
        attributes = change.after or await self._nfs.call(auth, "getattr", node.handle)
        assert isinstance(attributes, Attributes)
        return attributes

    async def _set_for_non_owner(self, auth: Auth, node: Inode, new: NewAttributes) -> Attributes:
        """Set attributes for a user who is not the owner: the server refuses a plain SETATTR.

        The kernel has checked the user's permission already.
        """
        if new == NewAttributes(atime=new.atime, mtime=new.mtime):
            now = TimeHow.SERVER, None  # any user with write permission may set the current time
            return await self._set(auth, node, NewAttributes(atime=now, mtime=now))
        attributes: Attributes = await self._nfs.call(auth, "getattr", node.handle)
        if new.mode is None or new != NewAttributes(mode=new.mode):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        if (attributes.mode ^ new.mode) & ~_SET_ID or new.mode & ~attributes.mode:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        # The kernel clears set-user-ID before a write by another user; the server does so itself.
        return attributes._replace(mode=new.mode)

    async def _look_up(self, auth: Auth, target: Target) -> Any:
        return await self._nfs.call(auth, "lookup", *target)

    async def _made(self, auth: Auth, target: Target, made: Any) -> pyfuse3.EntryAttributes:
        handle, attributes, _ = made
        if handle is None:
            handle, attributes, _ = await self._look_up(auth, target)
        return await self._entry(auth, handle, attributes)

    async def _entry(
        self, auth: Auth, handle: bytes, attributes: Attributes | None
    ) -> pyfuse3.EntryAttributes:
        """Return the entry of a file, and count a lookup by the kernel."""
        if attributes is None:
            attributes = await self._nfs.call(auth, "getattr", handle)
        return entry_of(self._nodes.acquire(handle), attributes)

    async def _silly_rename(self, auth: Auth, target: Target, unless: Target | None = None) -> bool:
        """Rename a file instead of removing it, if it is open on this machine (a silly rename).

        NFS has no open files: a removed one could not be read.  The last close removes the file.
        Returns whether the file was renamed.
        """
        if not self._open:
            return False
        try:
            handle, _, _ = await self._look_up(auth, target)
        except OSError:
            return False
        node = self._nodes.get(handle)
        if node is None or not node.opened or node.silly_name is not None:
            return False
        if unless is not None and (await self._look_up(auth, unless))[0] == handle:
            return False  # both names are links to one file: rename replaces nothing
        silly_name = Target(target.directory, b".nfs" + secrets.token_hex(8).encode())
        attributes = await self._nfs.call(auth, "getattr", handle)
        if attributes.kind == FileType.DIRECTORY:
            return False
        await self._nfs.call(auth, "rename", target, silly_name)
        node.silly_name = silly_name, auth
        return True


def _time(wanted: bool, nanoseconds: int) -> tuple[int, Time | None]:
    if not wanted:
        return TimeHow.KEEP, None
    seconds, rest = divmod(max(nanoseconds, 0), 1_000_000_000)
    return TimeHow.CLIENT, Time(min(seconds, 0xFFFFFFFF), rest)
