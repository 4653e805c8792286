"""The NFS procedures on directories, and the lookup of files for all procedures."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Callable
from typing import Any

from .attributes import attributes_of, set_attributes, wcc_attributes
from .errors import Caller, NfsError
from .handles import Signer
from .limits import NFS_READDIR_ENTRIES_MAX, NFS_READDIRPLUS_ENTRIES_MAX
from .listing import ListingCache, Name
from .nfs3 import (
    CreateMode,
    Device,
    Entry,
    EntryPlus,
    FileType,
    NewAttributes,
    Status,
    Target,
    WccData,
)
from .run_as import run_as
from .tree import FileRef

#: Maximum size of a listing's result without its entries; and of an entry without its name:
#: numbers, attributes, a handle, and padding.  In bytes.
_LISTING, _ENTRY, _ENTRY_PLUS = 120, 31, 31 + 88 + 4 + 56

_NAME_MAX = 255

_SPECIAL = {
    FileType.CHARACTER: stat.S_IFCHR,
    FileType.BLOCK: stat.S_IFBLK,
    FileType.SOCKET: stat.S_IFSOCK,
    FileType.FIFO: stat.S_IFIFO,
}


class Directories:
    """See Procedures."""

    def __init__(self, signer: Signer, listings: ListingCache, transfer: int) -> None:
        self.transfer = transfer
        self.signer = signer
        self._listings = listings

    def find(self, caller: Caller, handle: bytes) -> FileRef:
        """Return the file of a handle.

        Raises ValueError for an invalid handle, and OSError.
        """
        return caller.tree.find(self.signer.verify(handle))

    def wcc_data(self, caller: Caller, found: FileRef) -> WccData:
        """Return the attributes of a file before and after the call, which began with ``found``."""
        return WccData(wcc_attributes(found.state), attributes_of(caller.tree.refresh(found)))

    def lookup(self, caller: Caller, handle: bytes, name: bytes) -> Any:
        """Look up a name (LOOKUP)."""
        folder = self._folder(caller, handle)
        _check_name(name)
        with run_as(caller.identity):
            found = caller.tree.look_up(folder, name, caller.guest)
        return self.signer.sign(found.identifier), attributes_of(found), attributes_of(folder)

    def create(self, caller: Caller, target: Target, create_how: tuple[int, Any]) -> Any:
        """Create a file (CREATE)."""
        mode, content = create_how
        folder, name = self._name_in(caller, target, new=True)
        times = _verifier_times(content) if mode == CreateMode.EXCLUSIVE else None
        with run_as(caller.identity):
            try:
                _make_file(folder.fd, name, times)
                made = True
            except FileExistsError:
                if mode == CreateMode.GUARDED:
                    raise
                made = False
            found = caller.tree.look_up(folder, name, caller.guest)
            if times is not None:
                if not made and (found.state.atime, found.state.mtime) != tuple(
                    (seconds, 0) for seconds in times
                ):
                    raise OSError(errno.EEXIST, "created by another call")
                new = NewAttributes()
            elif made:
                new = content
            elif not stat.S_ISREG(found.state.mode):
                raise OSError(errno.EEXIST, "not a regular file")
            else:  # an existing file keeps everything but its size
                new = NewAttributes(size=content.size)
            set_attributes(found, new)
        return self._made(caller, folder, found)

    def mkdir(self, caller: Caller, target: Target, new: NewAttributes) -> Any:
        """Create a directory (MKDIR)."""

        def make(folder: int, name: bytes) -> None:
            os.mkdir(name, 0o700, dir_fd=folder)

        return self._make(caller, target, new, make)

    def symlink(self, caller: Caller, target: Target, new: NewAttributes, to: bytes) -> Any:
        """Create a symbolic link (SYMLINK)."""
        if b"\0" in to or not to:
            raise OSError(errno.EINVAL, "invalid path")

        def make(folder: int, name: bytes) -> None:
            os.symlink(to, name, dir_fd=folder)

        return self._make(caller, target, new._replace(mode=None), make)

    def mknod(self, caller: Caller, target: Target, what: tuple[int, Any]) -> Any:
        """Create a device, socket or FIFO (MKNOD)."""
        kind, content = what
        if kind not in _SPECIAL:
            raise NfsError(Status.BADTYPE)
        new, device = content, Device(0, 0)
        if kind in (FileType.CHARACTER, FileType.BLOCK):
            new, device = content
            if device.major >= 1 << 12 or device.minor >= 1 << 20:
                raise OSError(errno.EINVAL, "invalid device number")

        def make(folder: int, name: bytes) -> None:
            mode = 0o600 | _SPECIAL[FileType(kind)]
            os.mknod(name, mode, os.makedev(*device), dir_fd=folder)

        return self._make(caller, target, new, make)

    def remove(self, caller: Caller, handle: bytes, name: bytes) -> Any:
        """Remove a file (REMOVE)."""
        return self._remove(caller, Target(handle, name), os.unlink)

    def rmdir(self, caller: Caller, handle: bytes, name: bytes) -> Any:
        """Remove a directory (RMDIR)."""
        if name == b".":
            raise OSError(errno.EINVAL, "cannot remove .")
        if name == b"..":
            raise OSError(errno.ENOTEMPTY, "cannot remove ..")
        return self._remove(caller, Target(handle, name), os.rmdir)

    def rename(self, caller: Caller, source: Target, target: Target) -> Any:
        """Rename a file or directory (RENAME)."""
        source_folder, old = self._name_in(caller, source)
        target_folder, new = self._name_in(caller, target)
        with run_as(caller.identity):
            found = caller.tree.look_up(source_folder, old, caller.guest)
            try:
                replaced = caller.tree.look_up(target_folder, new, caller.guest)
            except FileNotFoundError:
                replaced = None
            os.rename(old, new, src_dir_fd=source_folder.fd, dst_dir_fd=target_folder.fd)
        if replaced is None or replaced.identifier != found.identifier:
            if replaced is not None:
                caller.tree.record_removal(target_folder, new, replaced)
            caller.tree.record_removal(source_folder, old, found)
            caller.tree.record_name(target_folder, new, found, caller.guest)
        return self.wcc_data(caller, source_folder), self.wcc_data(caller, target_folder)

    def link(self, caller: Caller, handle: bytes, target: Target) -> Any:
        """Create a hard link (LINK)."""
        found = self.find(caller, handle)
        folder, name = self._name_in(caller, target, new=True)
        if found.is_directory:
            raise OSError(errno.EPERM, "a directory")
        with run_as(caller.identity):
            os.link(found.path, name, dst_dir_fd=folder.fd, follow_symlinks=True)
        caller.tree.record_name(folder, name, found, caller.guest)
        return attributes_of(caller.tree.refresh(found)), self.wcc_data(caller, folder)

    def readdir(
        self, caller: Caller, handle: bytes, cookie: int, verifier: bytes, size: int
    ) -> Any:
        """List names (READDIR)."""

        def describe(folder: FileRef, found: Name) -> tuple[Entry, int]:
            cookie, name, ino = found
            if not ino:
                with contextlib.suppress(OSError):  # the parent's location is unknown
                    ino = caller.tree.look_up(folder, name, caller.guest).state.ino
            return Entry(ino, name, cookie), _ENTRY + len(name)

        return self._list(caller, handle, cookie, verifier, size, describe, NFS_READDIR_ENTRIES_MAX)

    def readdirplus(
        self, caller: Caller, handle: bytes, cookie: int, verifier: bytes, _: int, size: int
    ) -> Any:
        """List names with attributes and handles (READDIRPLUS)."""

        def describe(folder: FileRef, found: Name) -> tuple[EntryPlus, int] | None:
            cookie, name, ino = found
            more: tuple[Any, Any] = (None, None)
            try:
                with run_as(caller.identity):
                    file = caller.tree.look_up(folder, name, caller.guest)
            except FileNotFoundError:  # removed since the names were read
                return None
            except OSError:  # on another file system
                pass
            else:
                ino = file.state.ino
                more = attributes_of(file), self.signer.sign(file.identifier)
            return EntryPlus(ino, name, cookie, *more), _ENTRY_PLUS + len(name)

        return self._list(
            caller, handle, cookie, verifier, size, describe, NFS_READDIRPLUS_ENTRIES_MAX
        )

    def _list(
        self,
        caller: Caller,
        handle: bytes,
        cookie: int,
        verifier: bytes,
        size: int,
        describe: Callable[[FileRef, Name], tuple[Any, int] | None],
        most: int,
    ) -> Any:
        folder = self._folder(caller, handle)
        if cookie and verifier != self._listings.verifier:
            raise NfsError(Status.BAD_COOKIE)
        part, position = self._listings.after(caller.guest, folder, cookie, caller.identity)
        left = min(size, self.transfer) - _LISTING
        entries: list[Any] = []
        for found in itertools.islice(part.names, position, position + most):
            described = describe(folder, found)
            if described is not None:
                entry, length = described
                if length > left:
                    if not entries:
                        raise NfsError(Status.TOOSMALL)
                    break
                left -= length
                entries.append(entry)
            position += 1
        done = position == len(part.names) and part.end is None
        if not entries and not done:
            # All these names were removed.  The client needs a cookie to continue from.
            cookie, name, ino = part.names[position - 1]
            entries.append(EntryPlus(ino, name, cookie, None, None))
        return attributes_of(folder), self._listings.verifier, tuple(entries), done

    def _folder(self, caller: Caller, handle: bytes) -> FileRef:
        folder = self.find(caller, handle)
        if not folder.is_directory:
            raise OSError(errno.ENOTDIR, "not a directory")
        return folder

    def _name_in(self, caller: Caller, target: Target, new: bool = False) -> tuple[FileRef, bytes]:
        """Return a directory and a name in it other than ``.`` and ``..``.

        Raises OSError, and ValueError for an invalid handle.
        """
        folder = self._folder(caller, target.directory)
        _check_name(target.name)
        if target.name in (b".", b".."):
            raise OSError(errno.EEXIST if new else errno.EINVAL, "invalid name: . or ..")
        return folder, target.name

    def _make(
        self,
        caller: Caller,
        target: Target,
        new: NewAttributes,
        make: Callable[[int, bytes], None],
    ) -> Any:
        folder, name = self._name_in(caller, target, new=True)
        with run_as(caller.identity):
            make(folder.fd, name)
            found = caller.tree.look_up(folder, name, caller.guest)
            if new.mode is not None:  # set-group-ID, inherited from the parent, stays
                new = new._replace(mode=new.mode | found.state.mode & stat.S_ISGID)
            set_attributes(found, new._replace(size=None))
        return self._made(caller, folder, found)

    def _made(self, caller: Caller, folder: FileRef, found: FileRef) -> Any:
        found = caller.tree.refresh(found)
        handle = self.signer.sign(found.identifier)
        return handle, attributes_of(found), self.wcc_data(caller, folder)

    def _remove(self, caller: Caller, target: Target, remove: Callable[..., None]) -> Any:
        folder, name = self._name_in(caller, target)
        with run_as(caller.identity):
            found = caller.tree.look_up(folder, name, caller.guest)
            remove(name, dir_fd=folder.fd)
        caller.tree.record_removal(folder, name, found)
        return self.wcc_data(caller, folder)


def _verifier_times(verifier: bytes) -> tuple[int, int]:
    """Return times in seconds that record the verifier of an exclusive CREATE."""
    first, second = (int.from_bytes(verifier[i : i + 4]) & 0x7FFFFFFF for i in (0, 4))
    return first, second


def _make_file(folder: int, name: bytes, times: tuple[int, int] | None) -> None:
    """Create a file with the times ``times``.

    The file gets its name only after its times: a server that is killed leaves no file that a
    retransmission of the call would find without its verifier.  Raises FileExistsError.
    """
    if times is None:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW
        os.close(os.open(name, flags, 0o600, dir_fd=folder))
        return
    fd = os.open(b".", os.O_TMPFILE | os.O_WRONLY, 0o600, dir_fd=folder)
    try:
        os.utime(fd, times)
        os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=folder)
    finally:
        os.close(fd)


def _check_name(name: bytes) -> None:
    """Raise OSError for an invalid name in a directory."""
    if len(name) > _NAME_MAX:
        raise OSError(errno.ENAMETOOLONG, "name too long")
    if not name or b"/" in name or b"\0" in name:
        raise OSError(errno.EACCES, "invalid name")
