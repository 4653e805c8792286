"""The NFS procedures, performed on the files of an export."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Callable
from typing import Any

from .calls import Caller, NfsError
from .exports import UTIME_NOW, UTIME_OMIT, FileRef, FileState, run_as, set_times
from .handles import Signer
from .limits import NFS_READDIR_ENTRIES_MAX, NFS_READDIRPLUS_ENTRIES_MAX
from .listing import ListingCache, Name
from .nfs3 import (
    Access,
    Attributes,
    CreateMode,
    DeviceNumber,
    Entry,
    EntryPlus,
    FileType,
    FsInfo,
    FsStat,
    NewAttributes,
    PathConf,
    StableHow,
    Status,
    Target,
    Time,
    TimeHow,
    WccAttributes,
    WccData,
)

_KINDS = {
    stat.S_IFREG: FileType.REGULAR,
    stat.S_IFDIR: FileType.DIRECTORY,
    stat.S_IFBLK: FileType.BLOCK,
    stat.S_IFCHR: FileType.CHARACTER,
    stat.S_IFLNK: FileType.SYMLINK,
    stat.S_IFSOCK: FileType.SOCKET,
    stat.S_IFIFO: FileType.FIFO,
}


def time_of(pair: tuple[int, int]) -> Time:
    """Return (seconds since 1970, nanoseconds) as an NFS time, clamped to 32 unsigned bits."""
    seconds, nanoseconds = pair
    return Time(min(max(seconds, 0), 0xFFFFFFFF), nanoseconds)


def attributes_of(found: FileRef) -> Attributes:
    """Return the attributes of a file (fattr3)."""
    state = found.state
    return Attributes(
        _KINDS[stat.S_IFMT(state.mode)],
        stat.S_IMODE(state.mode),
        *(state.nlink, state.uid, state.gid, state.size, state.blocks * 512),
        DeviceNumber(*state.rdev),
        *(found.identifier.export, state.ino),
        *(time_of(state.atime), time_of(state.mtime), time_of(state.ctime)),
    )


def wcc_attributes(state: FileState) -> WccAttributes:
    """Return the attributes for a weak cache consistency check (wcc_attr, RFC 1813 2.6)."""
    return WccAttributes(state.size, time_of(state.mtime), time_of(state.ctime))


def set_attributes(found: FileRef, new: NewAttributes) -> None:
    """Set the attributes that ``new`` contains.

    Raises OSError if the caller may not, or a value is invalid.
    """
    if new.size is not None:
        os.truncate(found.path, new.size)
    if 0xFFFFFFFF in (new.uid, new.gid):  # chown(2) takes this value as "unchanged"
        raise OSError(errno.EINVAL, "invalid user or group")
    if new.uid is not None or new.gid is not None:
        # -1 means "unchanged".  chown precedes chmod because chown clears set-user-ID.
        keep = -1
        os.chown(
            found.path,
            keep if new.uid is None else new.uid,
            keep if new.gid is None else new.gid,
        )
    if new.mode is not None and not stat.S_ISLNK(found.state.mode):
        os.chmod(found.path, stat.S_IMODE(new.mode))
    times = [_new_time(*chosen) for chosen in (new.atime, new.mtime)]
    if any(nanoseconds != UTIME_OMIT for _, nanoseconds in times):
        set_times(found.path, *times)


def _new_time(source: int, time: Time | None) -> tuple[int, int]:
    if source == TimeHow.CLIENT:
        assert time is not None
        if time.nanoseconds >= 1_000_000_000:
            raise OSError(errno.EINVAL, "invalid nanoseconds")
        return time
    return 0, UTIME_NOW if source == TimeHow.SERVER else UTIME_OMIT


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

#: The largest offset on any file system known here.
_OFFSET_MAX = (1 << 63) - 1

#: Properties of FSINFO: links, symbolic links, the same PATHCONF for all files, times can be set.
_PROPERTIES = 1 | 2 | 8 | 16


class Procedures:
    """The NFS procedures, as methods that take a caller and arguments, and return results.

    All raise OSError or NfsError if the procedure fails, and ValueError for an invalid handle.
    """

    def __init__(
        self, signer: Signer, listings: ListingCache, verifier: bytes, transfer: int
    ) -> None:
        """Use the write verifier ``verifier``; READ, WRITE and listings have ``transfer`` bytes."""
        self.transfer = transfer
        self.signer = signer
        self._listings = listings
        self._verifier = verifier

    def find(self, caller: Caller, handle: bytes) -> FileRef:
        """Return the file of a handle.

        Raises ValueError for an invalid handle, OSError if the file does not exist.
        """
        return caller.tree.find(self.signer.verify(handle))

    def wcc_data(self, caller: Caller, found: FileRef) -> WccData:
        """Return a file's attributes before (those in ``found``) and after the call."""
        return WccData(wcc_attributes(found.state), attributes_of(caller.tree.refresh(found)))

    def getattr(self, caller: Caller, handle: bytes) -> Any:
        """Return a file's attributes (GETATTR)."""
        return attributes_of(self.find(caller, handle))

    def setattr(self, caller: Caller, handle: bytes, new: NewAttributes, guard: Time | None) -> Any:
        """Set a file's attributes, if its ctime is ``guard`` or ``guard`` is None (SETATTR)."""
        found = self.find(caller, handle)
        if guard is not None and guard != time_of(found.state.ctime):
            raise NfsError(Status.NOT_SYNC)
        if new.size is not None:
            if found.is_directory:
                raise OSError(errno.EISDIR, "is a directory")
            _truncate(caller, found, new.size)
        with run_as(caller.identity):
            set_attributes(found, new._replace(size=None))
        return self.wcc_data(caller, found)

    def lookup(self, caller: Caller, handle: bytes, name: bytes) -> Any:
        """Return the handle of a name in a directory (LOOKUP)."""
        folder = self._folder(caller, handle)
        _check_name(name)
        with run_as(caller.identity):
            found = caller.tree.look_up(folder, name, caller.guest)
        return self.signer.sign(found.identifier), attributes_of(found), attributes_of(folder)

    def access(self, caller: Caller, handle: bytes, asked: int) -> Any:
        """Return which of the permissions ``asked``, as bits, the caller has (ACCESS)."""
        found = self.find(caller, handle)
        read, write, execute = Access.READ, Access.MODIFY | Access.EXTEND, Access.EXECUTE
        if found.is_directory:
            write, execute = write | Access.DELETE, Access.LOOKUP
        granted = 0
        with run_as(caller.identity):
            for mode, bits in ((os.R_OK, read), (os.W_OK, write), (os.X_OK, execute)):
                if asked & bits and os.access(found.path, mode, effective_ids=True):
                    granted |= asked & bits
        if caller.tree.export.read_only:
            granted &= ~(Access.MODIFY | Access.EXTEND | Access.DELETE)
        return attributes_of(found), granted

    def readlink(self, caller: Caller, handle: bytes) -> Any:
        """Return the target of a symbolic link (READLINK)."""
        found = self.find(caller, handle)
        if not stat.S_ISLNK(found.state.mode):
            raise OSError(errno.EINVAL, "not a symbolic link")
        return attributes_of(found), os.fsencode(os.readlink("", dir_fd=found.fd))

    def read(self, caller: Caller, handle: bytes, offset: int, count: int) -> Any:
        """Read from a file (READ)."""
        found = self._regular(caller, handle)
        count = min(count, self.transfer)
        data = b""
        fd = _open(caller, found, os.O_RDONLY)
        try:
            if offset <= _OFFSET_MAX:
                data = os.pread(fd, min(count, _OFFSET_MAX - offset), offset)
        finally:
            os.close(fd)
        found = caller.tree.refresh(found)
        end = offset + len(data) >= found.state.size
        return attributes_of(found), len(data), end, data

    def write(
        self, caller: Caller, handle: bytes, offset: int, count: int, stable: int, data: bytes
    ) -> Any:
        """Write to a file (WRITE)."""
        found = self._regular(caller, handle)
        if count != len(data) or stable not in list(StableHow):
            raise OSError(errno.EINVAL, "invalid count or stability")
        if offset + count > _OFFSET_MAX:
            raise OSError(errno.EFBIG, "offset too large")
        fd = _open(caller, found, os.O_WRONLY)
        try:
            with run_as(caller.identity):  # the write of an ordinary user clears set-user-ID
                written = os.pwrite(fd, data, offset)
            if stable == StableHow.FILE_SYNC:
                os.fsync(fd)
            elif stable == StableHow.DATA_SYNC:
                os.fdatasync(fd)
        finally:
            os.close(fd)
        return self.wcc_data(caller, found), written, stable, self._verifier

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
                    raise OSError(errno.EEXIST, "another call has created the file")
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

    def mknod(self, caller: Caller, target: Target, special: tuple[int, Any]) -> Any:
        """Create a device, socket or FIFO (MKNOD)."""
        kind, content = special
        if kind not in _SPECIAL:
            raise NfsError(Status.BADTYPE)
        new, device = content, DeviceNumber(0, 0)
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
            caller.begin(source_folder, old, found)
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
            caller.begin(folder, name, found)
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
            except OSError:  # the name is on another file system
                pass
            else:
                ino = file.state.ino
                more = attributes_of(file), self.signer.sign(file.identifier)
            return EntryPlus(ino, name, cookie, *more), _ENTRY_PLUS + len(name)

        return self._list(
            caller, handle, cookie, verifier, size, describe, NFS_READDIRPLUS_ENTRIES_MAX
        )

    def fsstat(self, caller: Caller, handle: bytes) -> Any:
        """Return the capacity of the file system (FSSTAT)."""
        found = self.find(caller, handle)
        system = os.statvfs(found.path)
        size = system.f_frsize
        return FsStat(
            attributes_of(found),
            *(system.f_blocks * size, system.f_bfree * size, system.f_bavail * size),
            *(system.f_files, system.f_ffree, system.f_favail),
            0,
        )

    def fsinfo(self, caller: Caller, handle: bytes) -> Any:
        """Return static properties of the server (FSINFO)."""
        found = self.find(caller, handle)
        sizes = self.transfer, self.transfer, 4096
        return FsInfo(
            attributes_of(found),
            *sizes,
            *sizes,
            self.transfer,
            _OFFSET_MAX,
            Time(0, 1),
            _PROPERTIES,
        )

    def pathconf(self, caller: Caller, handle: bytes) -> Any:
        """Return the POSIX limits of the file system (PATHCONF)."""
        found = self.find(caller, handle)
        link_max = os.pathconf(found.path, "PC_LINK_MAX") if found.is_directory else 127
        return PathConf(attributes_of(found), link_max, 255, True, True, False, True)

    def commit(self, caller: Caller, handle: bytes, offset: int, count: int) -> Any:
        """Put written data on disk (COMMIT)."""
        found = self._regular(caller, handle)
        fd = os.open(found.path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        return self.wcc_data(caller, found), self._verifier

    def _list(
        self,
        caller: Caller,
        handle: bytes,
        cookie: int,
        verifier: bytes,
        size: int,
        describe: Callable[[FileRef, Name], tuple[Any, int] | None],
        limit: int,
    ) -> Any:
        folder = self._folder(caller, handle)
        if cookie and verifier != self._listings.verifier:
            raise NfsError(Status.BAD_COOKIE)
        part, position = self._listings.after(caller.guest, folder, cookie, caller.identity)
        left = min(size, self.transfer) - _LISTING
        entries: list[Any] = []
        for found in itertools.islice(part.names, position, position + limit):
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

        Raises OSError for an invalid name, ValueError for an invalid handle.
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
            caller.begin(folder, name, None)
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
            caller.begin(folder, name, found)
            remove(name, dir_fd=folder.fd)
        caller.tree.record_removal(folder, name, found)
        return self.wcc_data(caller, folder)

    def _regular(self, caller: Caller, handle: bytes) -> FileRef:
        found = self.find(caller, handle)
        if found.is_directory:
            raise OSError(errno.EISDIR, "is a directory")
        if not stat.S_ISREG(found.state.mode):  # opening a device or a FIFO has side effects
            raise OSError(errno.EINVAL, "not a regular file")
        return found


def _verifier_times(verifier: bytes) -> tuple[int, int]:
    """Return atime and mtime in seconds, which together record an exclusive CREATE's verifier."""
    first, second = (int.from_bytes(verifier[i : i + 4]) & 0x7FFFFFFF for i in (0, 4))
    return first, second


def _make_file(folder: int, name: bytes, times: tuple[int, int] | None) -> None:
    """Create a file; an exclusive CREATE keeps the call's verifier in the file's ``times``.

    The file gets its name only after its times: if the server is killed, a retransmission of the
    call finds no file without the verifier.

    Raises FileExistsError if the name is in use.
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


def _open(caller: Caller, found: FileRef, flags: int) -> int:
    """Open a file that the client may have opened when its mode allowed it (RFC 1813 4.4).

    The owner has access with any mode, and execute permission implies reading: the client's
    kernel has to read a program to execute it.
    """
    with run_as(caller.identity):
        try:
            return os.open(found.path, flags)
        except PermissionError:
            runs = flags == os.O_RDONLY and os.access(found.path, os.X_OK, effective_ids=True)
            if not runs and found.state.uid != caller.identity.uid:
                raise
    return os.open(found.path, flags)


def _truncate(caller: Caller, found: FileRef, size: int) -> None:
    """Truncate a file that the client may have open, regardless of its mode; see ``_open``."""
    if size > _OFFSET_MAX:
        raise OSError(errno.EFBIG, "size too large")
    try:
        with run_as(caller.identity):
            os.truncate(found.path, size)
    except PermissionError:
        if found.state.uid != caller.identity.uid:
            raise
        os.truncate(found.path, size)
