"""System calls that Python lacks: openat2, statx, setfsuid, the whole of utimensat."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from .._linux.libc import libc
from .exports import UnixIdentity

_SYS_OPENAT2 = 437  # the same on every architecture
_RESOLVE_NO_XDEV, _RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 1, 2, 4, 8
_BENEATH = _RESOLVE_NO_XDEV | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH
_OPEN_HOW = struct.Struct("QQQ")

_AT_EMPTY_PATH = 0x1000
_STATX_ALL = 0xFFF  # including the birth time
_STATX_SIZE = 256
#: linux/stat.h: nlink, uid, gid, mode; ino, size, blocks; four times; two device numbers.
_STATX = struct.Struct("=16xIIIHxxQQQ8x" + "qI4x" * 4 + "IIII")

UTIME_NOW, UTIME_OMIT = 0x3FFFFFFF, 0x3FFFFFFE


class FileState(NamedTuple):
    """The result of statx.

    Times are (seconds, nanoseconds); ``btime`` is (0, 0) if the file system has no birth time.
    """

    nlink: int
    uid: int
    gid: int
    mode: int
    ino: int
    size: int
    blocks: int
    atime: tuple[int, int]
    btime: tuple[int, int]
    ctime: tuple[int, int]
    mtime: tuple[int, int]
    rdev: tuple[int, int]
    dev: tuple[int, int]


def open_beneath(folder: int, path: bytes, flags: int, mode: int = 0) -> int:
    """Open ``path`` below ``folder``, which neither ``..`` nor a symbolic link can leave.

    Raises OSError.
    """
    how = _OPEN_HOW.pack(flags | os.O_CLOEXEC, mode, _BENEATH)
    fd = libc.syscall(_SYS_OPENAT2, folder, ctypes.c_char_p(path), how, len(how))
    if fd < 0:
        _fail()
    return int(fd)


def file_state(fd: int) -> FileState:
    """Return the state of an open file, also of an O_PATH descriptor.

    Raises OSError.
    """
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    if libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_ALL, buffer) < 0:
        _fail()
    nlink, uid, gid, mode, ino, size, blocks, *rest = _STATX.unpack_from(buffer)
    pairs = [(rest[i], rest[i + 1]) for i in range(0, 12, 2)]
    return FileState(nlink, uid, gid, mode, ino, size, blocks, *pairs)


def set_times(path: str, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    """Set a file's times, each (seconds, nanoseconds or UTIME_…).

    Raises OSError.
    """
    times = struct.pack("qqqq", *atime, *mtime)
    if libc.utimensat(-100, path.encode(), times, 0) < 0:  # AT_FDCWD, unused: the path is absolute
        _fail()


def set_file_rights(uid: int, gid: int, groups: tuple[int, ...]) -> None:
    """Take the file system rights of a user; uid and gid 0 restore those of this process.

    Only root may call this.  Leaving uid 0 also drops the capabilities that override permissions
    (capabilities(7)).

    Raises OSError.
    """
    if uid:  # before CAP_SETGID and CAP_SETUID are dropped
        _set_groups(gid, groups)
        libc.setfsuid(ctypes.c_uint32(uid))
    else:
        libc.setfsuid(0)
        _set_groups(gid, groups)
    if libc.setfsuid(ctypes.c_uint32(0xFFFFFFFF)) & 0xFFFFFFFF != uid:
        raise OSError(errno.EPERM, f"cannot act as user {uid}")


def _set_groups(gid: int, groups: tuple[int, ...]) -> None:
    os.setgroups(groups)
    libc.setfsgid(ctypes.c_uint32(gid))


def _fail() -> None:
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code))


@contextlib.contextmanager
def run_as(identity: UnixIdentity) -> Iterator[None]:
    """Have the with block act with the file system rights of ``identity``.

    Has no effect if this process is not root.
    """
    if os.geteuid() != 0 or identity == (0, 0, ()):
        yield
        return
    own = tuple(os.getgroups())
    try:
        set_file_rights(*identity)
        yield
    finally:
        set_file_rights(0, os.getegid(), own)
