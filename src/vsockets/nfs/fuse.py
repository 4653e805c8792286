"""An export as a directory of this machine: FUSE operations performed by NFS calls."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import secrets
import stat
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import pyfuse3

from .inode_table import Inode, InodeTable, content_of, entry_of
from .nfs3 import VERIFIER_SIZE, Attributes, Device, FileType, NewAttributes, Target, Time, TimeHow
from .nfs_client import NfsClient, credentials
from .rpc import Auth

P = ParamSpec("P")
T = TypeVar("T")

_SPECIAL = {
    stat.S_IFCHR: FileType.CHARACTER,
    stat.S_IFBLK: FileType.BLOCK,
    stat.S_IFSOCK: FileType.SOCKET,
    stat.S_IFIFO: FileType.FIFO,
}

_SET_ID = stat.S_ISUID | stat.S_ISGID


def _told(method: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Decorate ``method`` so that its OSErrors are reported to the kernel."""

    @functools.wraps(method)
    async def tell(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await method(*args, **kwargs)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None

    return tell


def _who(context: pyfuse3.RequestContext) -> Auth:
    """Return the credentials of the process that sent a request."""
    groups: set[int] = set()
    if context.uid != 0:
        with contextlib.suppress(OSError):  # the process has ended
            groups = pyfuse3.get_sup_groups(context.pid)
    return credentials(context.uid, context.gid, tuple(sorted(groups - {context.gid})))


@dataclass(slots=True)
class _Open:
    """An open file or directory, with the credentials of the process that opened it."""

    node: Inode
    who: Auth
    verifier: bytes = bytes(VERIFIER_SIZE)  #: the verifier of a directory's cookies


class Mounted(pyfuse3.Operations):
    """The operations of a mounted export, as pyfuse3 defines them."""

    supports_dot_lookup = False
    enable_acl = False
    enable_writeback_cache = False

    def __init__(self, nfs: NfsClient, root: bytes) -> None:
        super().__init__()
        self._nfs = nfs
        self._nodes = InodeTable(nfs, root)
        self._open: dict[int, _Open] = {}
        self._last_open = 0

    # Names

    @_told
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Look up a name."""
        handle, attributes, _ = await self._look_up(_who(ctx), self._target(parent_inode, name))
        return await self._entry(_who(ctx), handle, attributes)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Drop lookup counts of inodes that the kernel forgets."""
        for number, times in inode_list:
            self._nodes.forget(number, times)

    @_told
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Create a directory."""
        new = NewAttributes(mode=stat.S_IMODE(mode))
        target, who = self._target(parent_inode, name), _who(ctx)
        return await self._made(who, target, await self._nfs.call(who, "mkdir", target, new))

    @_told
    async def symlink(
        self,
        parent_inode: int,
        name: bytes,
        target: bytes,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Create a symbolic link."""
        place, who = self._target(parent_inode, name), _who(ctx)
        made = await self._nfs.call(who, "symlink", place, NewAttributes(), bytes(target))
        return await self._made(who, place, made)

    @_told
    async def mknod(
        self,
        parent_inode: int,
        name: bytes,
        mode: int,
        rdev: int,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Create a file, device, socket or FIFO."""
        target, who = self._target(parent_inode, name), _who(ctx)
        new = NewAttributes(mode=stat.S_IMODE(mode))
        if stat.S_ISREG(mode):
            return await self._made(who, target, await self._nfs.create(who, target, new, True))
        kind = _SPECIAL.get(stat.S_IFMT(mode))
        if kind is None:
            raise OSError(errno.EINVAL, "unsupported file type")
        content: Any = new
        if kind in (FileType.CHARACTER, FileType.BLOCK):
            content = new, Device(os.major(rdev), os.minor(rdev))
        made = await self._nfs.call(who, "mknod", target, (kind, content))
        return await self._made(who, target, made)

    @_told
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Remove a file; if it is open here, rename it until it is closed."""
        target, who = self._target(parent_inode, name), _who(ctx)
        if not await self._set_aside(who, target):
            await self._nfs.call(who, "remove", *target)

    @_told
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Remove a directory."""
        await self._nfs.call(_who(ctx), "rmdir", *self._target(parent_inode, name))

    @_told
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        """Rename a file or directory; keep a replaced file until it is closed here."""
        if flags:
            raise OSError(errno.EINVAL, "NFS does not support flags of rename")
        old, new = (
            self._target(parent_inode_old, name_old),
            self._target(parent_inode_new, name_new),
        )
        who = _who(ctx)
        if old != new:
            await self._set_aside(who, new, unless=old)
        await self._nfs.call(who, "rename", old, new)

    @_told
    async def link(
        self,
        inode: int,
        new_parent_inode: int,
        new_name: bytes,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Create a hard link."""
        node, who = self._nodes[inode], _who(ctx)
        target = self._target(new_parent_inode, new_name)
        attributes, _ = await self._nfs.call(who, "link", node.handle, target)
        return await self._entry(who, node.handle, attributes)

    # Attributes

    @_told
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Return attributes."""
        node = self._nodes[inode]
        return entry_of(node, await self._nfs.call(_who(ctx), "getattr", node.handle))

    @_told
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Set attributes."""
        node, who = self._nodes[inode], _who(ctx)
        new = NewAttributes(
            mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime=_time(fields.update_atime, attr.st_atime_ns),
            mtime=_time(fields.update_mtime, attr.st_mtime_ns),
        )
        if fh is not None:
            who = self._open[fh].who
        try:
            return entry_of(node, await self._set(who, node, new))
        except PermissionError:
            if ctx.uid == 0:
                raise
            return entry_of(node, await self._set_for_another(who, node, new))

    @_told
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        """Return the target of a symbolic link."""
        _, path = await self._nfs.call(_who(ctx), "readlink", self._nodes[inode].handle)
        return bytes(path)

    @_told
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Return the capacity of the server's file system."""
        root = self._nodes[pyfuse3.ROOT_INODE].handle
        told = await self._nfs.call(_who(ctx), "fsstat", root)
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = block = 4096
        data.f_blocks, data.f_bfree = told.total // block, told.free // block
        data.f_bavail, data.f_files = told.available // block, told.files
        data.f_ffree, data.f_favail, data.f_namemax = told.files_free, told.files_available, 255
        return data

    # Open files

    @_told
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open a file; invalidate the kernel's cache if the file has changed since."""
        node, who = self._nodes[inode], _who(ctx)
        if flags & os.O_TRUNC:
            attributes = await self._set(who, node, NewAttributes(size=0))
        else:
            attributes = await self._nfs.call(who, "getattr", node.handle)
        same = content_of(attributes) == node.told
        if not same:  # the kernel's cache may predate another client's close
            pyfuse3.invalidate_inode(inode, attr_only=True)
        return pyfuse3.FileInfo(fh=self._opened(node, who), keep_cache=same)

    @_told
    async def create(
        self,
        parent_inode: int,
        name: bytes,
        mode: int,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """Create and open a file."""
        target, who = self._target(parent_inode, name), _who(ctx)
        new = NewAttributes(mode=stat.S_IMODE(mode), size=0 if flags & os.O_TRUNC else None)
        made = await self._nfs.create(who, target, new, bool(flags & os.O_EXCL))
        entry = await self._made(who, target, made)
        return pyfuse3.FileInfo(fh=self._opened(self._nodes[entry.st_ino], who)), entry

    @_told
    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Read from an open file."""
        opened = self._open[fh]
        data = bytearray()
        while len(data) < size:
            count = min(self._nfs.transfer, size - len(data))
            arguments = opened.node.handle, off + len(data), count
            _, _, end, part = await self._nfs.call(opened.who, "read", *arguments)
            data += part[:count]
            if end or not part:
                break
        return bytes(data)

    @_told
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write to an open file; the data may remain uncommitted until ``flush``."""
        opened = self._open[fh]
        await opened.node.uncommitted.write(opened.who, off, bytes(buf))
        return len(buf)

    @_told
    async def flush(self, fh: int) -> None:
        """Commit written data when a descriptor is closed."""
        opened = self._open[fh]
        await opened.node.uncommitted.commit(opened.who)

    @_told
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Commit written data."""
        opened = self._open[fh]
        await opened.node.uncommitted.commit(opened.who)

    @_told
    async def release(self, fh: int) -> None:
        """Close a file; remove it if it was unlinked while open."""
        opened = self._open.pop(fh)
        node = opened.node
        try:
            await node.uncommitted.commit(opened.who)  # written by a memory mapping since flush
        finally:
            node.opened -= 1
            if not node.opened and node.aside is not None:
                (target, who), node.aside = node.aside, None
                await self._nfs.call(who, "remove", *target)

    # Directories

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """Open a directory."""
        return self._opened(self._nodes[inode], _who(ctx))

    @_told
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List entries from the cookie ``start_id``."""
        opened = self._open[fh]
        cookie, end, room = start_id, False, self._nfs.transfer
        while not end:
            arguments = opened.node.handle, cookie, opened.verifier, room // 8, room
            _, opened.verifier, entries, end = await self._nfs.call(
                opened.who, "readdirplus", *arguments
            )
            end = end or not entries
            for _, name, next_cookie, attributes, handle in entries:
                cookie = next_cookie
                if name in (b".", b".."):
                    continue
                if handle is None or attributes is None:
                    target = Target(opened.node.handle, name)
                    try:
                        handle, attributes, _ = await self._look_up(opened.who, target)
                    except OSError:  # removed meanwhile
                        continue
                entry = await self._entry(opened.who, handle, attributes)
                if not pyfuse3.readdir_reply(token, name, entry, cookie):
                    self._nodes.forget(entry.st_ino, 1)
                    return

    async def releasedir(self, fh: int) -> None:
        """Close a directory."""
        self._open.pop(fh).node.opened -= 1

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Return at once: the server has completed what it replied to."""

    def _target(self, folder: int, name: bytes) -> Target:
        return Target(self._nodes[folder].handle, bytes(name))

    def _opened(self, node: Inode, who: Auth) -> int:
        self._last_open += 1
        self._open[self._last_open] = _Open(node, who)
        node.opened += 1
        return self._last_open

    async def _set(self, who: Auth, node: Inode, new: NewAttributes) -> Attributes:
        if new.size is not None:  # otherwise a repeated write could extend the file again
            await node.uncommitted.commit(who)
        change = await self._nfs.call(who, "setattr", node.handle, new, None)
        attributes = change.after or await self._nfs.call(who, "getattr", node.handle)
        assert isinstance(attributes, Attributes)
        return attributes

    async def _set_for_another(self, who: Auth, node: Inode, new: NewAttributes) -> Attributes:
        """Set attributes that the kernel sets after its own permission check.

        The caller is not the owner, so the server refuses the plain SETATTR.
        """
        if new == NewAttributes(atime=new.atime, mtime=new.mtime):
            now = TimeHow.SERVER, None  # any user with write permission may set the current time
            return await self._set(who, node, NewAttributes(atime=now, mtime=now))
        attributes: Attributes = await self._nfs.call(who, "getattr", node.handle)
        if new.mode is None or new != NewAttributes(mode=new.mode):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        if (attributes.mode ^ new.mode) & ~_SET_ID or new.mode & ~attributes.mode:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        # The kernel clears set-user-ID before a write by another user; the server does so itself.
        return attributes._replace(mode=new.mode)

    async def _look_up(self, who: Auth, target: Target) -> Any:
        return await self._nfs.call(who, "lookup", *target)

    async def _made(self, who: Auth, target: Target, made: Any) -> pyfuse3.EntryAttributes:
        handle, attributes, _ = made
        if handle is None:
            handle, attributes, _ = await self._look_up(who, target)
        return await self._entry(who, handle, attributes)

    async def _entry(
        self, who: Auth, handle: bytes, attributes: Attributes | None
    ) -> pyfuse3.EntryAttributes:
        """Return the entry of a file, and count a lookup by the kernel."""
        if attributes is None:
            attributes = await self._nfs.call(who, "getattr", handle)
        return entry_of(self._nodes.meet(handle), attributes)

    async def _set_aside(self, who: Auth, target: Target, unless: Target | None = None) -> bool:
        """Rename a file that is open here instead of removing it, as NFS has no open files.

        Returns whether the file was renamed (a silly rename); the last close removes it.
        """
        if not self._open:
            return False
        try:
            handle, _, _ = await self._look_up(who, target)
        except OSError:
            return False
        node = self._nodes.known(handle)
        if node is None or not node.opened or node.aside is not None:
            return False
        if unless is not None and (await self._look_up(who, unless))[0] == handle:
            return False  # both names are links to one file: rename replaces nothing
        aside = Target(target.directory, b".nfs" + secrets.token_hex(8).encode())
        attributes = await self._nfs.call(who, "getattr", handle)
        if attributes.kind == FileType.DIRECTORY:
            return False
        await self._nfs.call(who, "rename", target, aside)
        node.aside = aside, who
        return True


def _time(wanted: bool, nanoseconds: int) -> tuple[int, Time | None]:
    if not wanted:
        return TimeHow.KEEP, None
    seconds, rest = divmod(max(nanoseconds, 0), 1_000_000_000)
    return TimeHow.CLIENT, Time(min(seconds, 0xFFFFFFFF), rest)
