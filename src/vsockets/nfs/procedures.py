"""The NFS procedures, performed on the files of an export."""

from __future__ import annotations

import errno
import os
import stat
from typing import Any

from .attributes import attributes_of, set_attributes, time_of
from .directories import Directories
from .errors import Caller, NfsError
from .handles import Signer
from .listing import ListingCache
from .nfs3 import Access, FsInfo, FsStat, NewAttributes, PathConf, StableHow, Status, Time
from .run_as import run_as
from .tree import FileRef

#: The largest offset on any file system known here.
_OFFSET_MAX = (1 << 63) - 1

#: Properties of FSINFO: links, symbolic links, the same PATHCONF for all files, times can be set.
_PROPERTIES = 1 | 2 | 8 | 16


class Procedures(Directories):
    """The NFS procedures: each takes a caller and the arguments, and returns the results after OK.

    All raise OSError, NfsError, and ValueError for an invalid handle.
    """

    def __init__(
        self, signer: Signer, listings: ListingCache, verifier: bytes, transfer: int
    ) -> None:
        super().__init__(signer, listings, transfer)
        self._verifier = verifier

    def getattr(self, caller: Caller, handle: bytes) -> Any:
        """Return attributes (GETATTR)."""
        return attributes_of(self.find(caller, handle))

    def setattr(self, caller: Caller, handle: bytes, new: NewAttributes, guard: Time | None) -> Any:
        """Set attributes (SETATTR)."""
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

    def access(self, caller: Caller, handle: bytes, asked: int) -> Any:
        """Check permissions (ACCESS)."""
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

    def commit(self, caller: Caller, handle: bytes, offset: int, count: int) -> Any:
        """Put written data on disk (COMMIT)."""
        found = self._regular(caller, handle)
        fd = os.open(found.path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        return self.wcc_data(caller, found), self._verifier

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

    def _regular(self, caller: Caller, handle: bytes) -> FileRef:
        found = self.find(caller, handle)
        if found.is_directory:
            raise OSError(errno.EISDIR, "is a directory")
        if not stat.S_ISREG(found.state.mode):  # opening a device or a FIFO has side effects
            raise OSError(errno.EINVAL, "not a regular file")
        return found


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
