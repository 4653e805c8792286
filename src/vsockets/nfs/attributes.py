"""Conversion between Linux file attributes and those of NFS."""

from __future__ import annotations

import errno
import os
import stat

from .nfs3 import Attributes, DeviceNumber, FileType, NewAttributes, Time, TimeHow, WccAttributes
from .syscalls import UTIME_NOW, UTIME_OMIT, FileState, set_times
from .tree import FileRef

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

    Raises OSError.
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
