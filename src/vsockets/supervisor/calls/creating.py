"""socket(), and ``/dev/vsock``: open(), stat(), access() and related calls.

stat() and access() are served with ``vsock run --device`` alone: ``/dev/vsock`` then exists, with
mode 0666.  A filter does not see paths, so that all such calls on any file are intercepted.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat as modes
import struct
from socket import SOCK_CLOEXEC, SOCK_DGRAM, SOCK_NONBLOCK, SOCK_SEQPACKET, SOCK_STREAM

from ...model.constants import AF_VSOCK
from ..call import Call, failure

DEVICE = b"/dev/vsock\0"
#: The name, in /proc, of the file that stands for ``/dev/vsock``.
DEVICE_NAME = "vsock-device"

#: Linux's device: major number "misc", and a minor number that was free.
_MAJOR, _MINOR = 10, 121
_MODE = modes.S_IFCHR | 0o666
_BASIC_STATS = 0x7FF
_AT_EMPTY_PATH, _AT_SYMLINK_NOFOLLOW, _AT_EACCESS = 0x1000, 0x100, 0x200

_X86_64 = 0xC000_003E
#: struct stat, whose layout differs by architecture: device, inode, links, mode, user, group, the
#: device's own number, size, block size, blocks and three times.
_STAT_X86_64 = struct.Struct("=QQQIII4xQqqqqQqQqQ24x")
_STAT_GENERIC = struct.Struct("=QQIIIIQ8xqi4xqqQqQqQ8x")
#: struct statx: mask, block size, attributes, links, user, group, mode, inode, size, blocks,
#: attributes' mask; four times; the device's own number, and that of the device it is on.
_STATX = struct.Struct("=IIQIIIH2xQQQQ" + "qI4x" * 4 + "IIII112x")

_TYPE_BITS = ~int(SOCK_NONBLOCK | SOCK_CLOEXEC)
_TYPES = (int(SOCK_STREAM), int(SOCK_SEQPACKET), int(SOCK_DGRAM))


def socket(call: Call) -> None:
    """Serve socket(AF_VSOCK, …); the filter intercepts no other family."""
    asked, protocol = call.integer(1), call.integer(2)
    type_ = asked & _TYPE_BITS
    if protocol not in (0, AF_VSOCK):
        raise failure(errno.EPROTONOSUPPORT)
    if type_ not in _TYPES:
        raise failure(errno.ESOCKTNOSUPPORT)
    if call.services.interceptor.begin_socket_calls(call.intercepted):
        call.create_socket(asked)


def open_(call: Call) -> None:
    """Serve open() of ``/dev/vsock``."""
    _open(call, call.integer(1))


def openat(call: Call) -> None:
    """Serve openat() of ``/dev/vsock``."""
    _open(call, call.integer(2))


def _open(call: Call, flags: int) -> None:
    # The path was read once, by the dispatcher: a change since has no effect.
    call.check()
    device = os.memfd_create(DEVICE_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        fcntl.fcntl(device, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW)
        call.answer_with_descriptor(device, bool(flags & os.O_CLOEXEC))
    finally:
        os.close(device)


def is_device(link: str) -> bool:
    """Return whether ``link``, from /proc/PID/fd, is the device or the file that stands for it."""
    return link.startswith(f"/memfd:{DEVICE_NAME}") or link == DEVICE[:-1].decode()


def stat(call: Call) -> int:
    """Serve stat() and lstat()."""
    call.write((call.arguments[1], _stat(call)))
    return 0


def newfstatat(call: Call) -> int:
    """Serve newfstatat(): the path is absolute, so the folder does not matter."""
    call.write((call.arguments[2], _stat(call)))
    return 0


def statx(call: Call) -> int:
    """Serve statx()."""
    folder = os.stat("/dev")
    seconds, nanoseconds = divmod(folder.st_mtime_ns, 1_000_000_000)
    times = (seconds, nanoseconds) * 4
    found = _STATX.pack(
        *(_BASIC_STATS, folder.st_blksize, 0, 1, 0, 0, _MODE, folder.st_ino, 0, 0, 0),
        *times,
        *(_MAJOR, _MINOR, os.major(folder.st_dev), os.minor(folder.st_dev)),
    )
    call.write((call.arguments[4], found))
    return 0


def access(call: Call) -> int:
    """Serve access(): every user may read and write, and not execute."""
    return _access(call, call.integer(1))


def faccessat(call: Call) -> int:
    """Serve faccessat(): access() relative to a folder."""
    return _access(call, call.integer(2))


def faccessat2(call: Call) -> int:
    """Serve faccessat2(): faccessat() with flags."""
    if call.integer(3) & ~(_AT_EMPTY_PATH | _AT_SYMLINK_NOFOLLOW | _AT_EACCESS):
        raise failure(errno.EINVAL)
    return _access(call, call.integer(2))


def _access(call: Call, mode: int) -> int:
    call.check()  # the path was the caller's
    if mode & ~(os.R_OK | os.W_OK | os.X_OK):
        raise failure(errno.EINVAL)
    if mode & os.X_OK:
        raise failure(errno.EACCES)
    return 0


def _stat(call: Call) -> bytes:
    folder = os.stat("/dev")
    seconds, nanoseconds = divmod(folder.st_mtime_ns, 1_000_000_000)
    times = (seconds, nanoseconds) * 3
    place, number = (folder.st_dev, folder.st_ino), os.makedev(_MAJOR, _MINOR)
    size = 0, folder.st_blksize, 0
    if call.services.architecture.architecture == _X86_64:
        return _STAT_X86_64.pack(*place, 1, _MODE, 0, 0, number, *size, *times)
    return _STAT_GENERIC.pack(*place, _MODE, 1, 0, 0, number, *size, *times)
