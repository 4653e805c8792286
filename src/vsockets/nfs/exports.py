"""Exports: the contexts that may mount them, and their files, found by handle.

Nothing outside an export is opened.  System calls that Python lacks (openat2, statx, setfsuid, the
whole of utimensat) keep to the export and to the rights of the caller.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import stat
import struct
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .._linux.libc import libc
from ..model.address import parse_cid
from .handles import HandleStore, Identifier
from .limits import NFS_DIRECTORY_DEPTH_MAX, NFS_OPEN_FILES_MAX
from .rpc import AuthSys

#: The uid and gid without rights that replace root's (Linux's default anonuid).
ANONYMOUS_ID = 65_534


def _valid_id(number: int) -> int:
    """Return ``number``, or ANONYMOUS_ID for -1, which means "unchanged" to chown(2)."""
    return ANONYMOUS_ID if number == 0xFFFFFFFF else number


class UnixIdentity(NamedTuple):
    """The user and groups with whose rights a call is performed."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Export:
    """An exported directory; ``cids`` are the contexts that may mount it (None: all)."""

    path: str
    read_only: bool = False
    cids: frozenset[int] | None = None
    root_squash: bool = True

    @classmethod
    def parse(cls, text: str) -> Export:
        """Parse ``DIR[,ro][,cid=3:4][,no-root-squash]``.

        Raises ValueError if it is invalid, or the directory does not exist.
        """
        path, *options = text.split(",")
        if not os.path.isabs(path):
            raise ValueError(f"{path!r}: expected an absolute path")
        if not os.path.isdir(path):
            raise ValueError(f"{path!r}: directory not found")
        read_only, cids, root_squash = False, None, True
        for option in options:
            if option in ("ro", "rw"):
                read_only = option == "ro"
            elif option == "no-root-squash":
                root_squash = False
            elif option.startswith("cid="):
                cids = frozenset(parse_cid(cid) for cid in option[4:].split(":"))
            else:
                raise ValueError(f"{option!r}: expected ro, rw, cid=CID:… or no-root-squash")
        return cls(os.path.realpath(path), read_only, cids, root_squash)

    def admits(self, cid: int) -> bool:
        """Return whether context ``cid`` may mount the export."""
        return self.cids is None or cid in self.cids

    def identity(self, caller: AuthSys | None) -> UnixIdentity:
        """Return the identity of ``caller`` in this export; None stands for missing credentials."""
        if caller is None:
            return UnixIdentity(ANONYMOUS_ID, ANONYMOUS_ID)
        uid, gid, groups = (
            _valid_id(caller.uid),
            _valid_id(caller.gid),
            tuple(map(_valid_id, caller.groups)),
        )
        if self.root_squash:
            uid, gid = uid or ANONYMOUS_ID, gid or ANONYMOUS_ID
            groups = tuple(group or ANONYMOUS_ID for group in groups)
        return UnixIdentity(uid, gid, groups)


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

    Raises OSError if the file cannot be opened, OSError(EXDEV) if the path leaves ``folder``.
    """
    how = _OPEN_HOW.pack(flags | os.O_CLOEXEC, mode, _BENEATH)
    fd = libc.syscall(_SYS_OPENAT2, folder, ctypes.c_char_p(path), how, len(how))
    if fd < 0:
        _fail()
    return int(fd)


def file_state(fd: int) -> FileState:
    """Return the state of an open file, also of an O_PATH descriptor.

    Raises OSError if the file system does not answer, such as OSError(ESTALE).
    """
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    if libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_ALL, buffer) < 0:
        _fail()
    nlink, uid, gid, mode, ino, size, blocks, *rest = _STATX.unpack_from(buffer)
    pairs = [(rest[i], rest[i + 1]) for i in range(0, 12, 2)]
    return FileState(nlink, uid, gid, mode, ino, size, blocks, *pairs)


def set_times(path: str, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    """Set a file's times, each (seconds, nanoseconds or UTIME_…).

    Raises OSError if the caller may not.
    """
    times = struct.pack("qqqq", *atime, *mtime)
    if libc.utimensat(-100, path.encode(), times, 0) < 0:  # AT_FDCWD, unused: the path is absolute
        _fail()


def set_file_rights(uid: int, gid: int, groups: tuple[int, ...]) -> None:
    """Take the file system rights of a user; uid and gid 0 restore those of this process.

    Only root may call this.  Leaving uid 0 also drops the capabilities that override permissions
    (capabilities(7)).

    Raises OSError if the kernel refuses.
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


#: Errors that mean that a file is not at a recorded location.
_MOVED_ERRORS = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.EXDEV, errno.ELOOP)

_REFERENCE = os.O_PATH | os.O_NOFOLLOW


class FileRef(NamedTuple):
    """A file: an O_PATH descriptor, its identity and its state."""

    fd: int
    identifier: Identifier
    state: FileState

    @property
    def path(self) -> str:
        """A path that refers to this file itself, also if it is a symbolic link."""
        return f"/proc/self/fd/{self.fd}"

    @property
    def is_directory(self) -> bool:
        """True if this is a directory."""
        return stat.S_ISDIR(self.state.mode)


class Tree:
    """The files of one export.

    The tree owns the descriptors in its results; they are valid for one call.
    """

    def __init__(self, export: Export, handle_store: HandleStore) -> None:
        """Open the export's directory.

        Raises OSError if that fails.
        """
        self.export = export
        self._handle_store = handle_store
        digest = hashlib.blake2b(os.fsencode(export.path), digest_size=8).digest()
        self.number = int.from_bytes(digest)
        self._root_fd = os.open(export.path, os.O_PATH | os.O_DIRECTORY)
        self._open: OrderedDict[Identifier, int] = OrderedDict()
        self.root = self._identify(file_state(self._root_fd))

    def close(self) -> None:
        """Close all files."""
        for fd in (*self._open.values(), self._root_fd):
            os.close(fd)
        self._open.clear()

    def find(self, file: Identifier) -> FileRef:
        """Return the file with an identity.

        Raises OSError(ESTALE) if the file is at none of its recorded locations.
        """
        return self._find(file, NFS_DIRECTORY_DEPTH_MAX)

    def look_up(self, folder: FileRef, name: bytes, guest: Hashable) -> FileRef:
        """Return the file ``name`` in ``folder`` and record its location for ``guest``.

        Raises OSError(ENOENT) if the file does not exist.
        """
        if name == b".":
            return folder
        if name == b"..":
            return self._parent(folder)
        fd = open_beneath(folder.fd, name, _REFERENCE)
        found = self._cache(fd)
        self._handle_store.add(found.identifier, folder.identifier, name, guest)
        return found

    def record_removal(self, folder: FileRef, name: bytes, file: FileRef) -> None:
        """Record that ``file`` no longer has the name ``name`` in ``folder``."""
        self._handle_store.remove(file.identifier, folder.identifier, name)
        with contextlib.suppress(OSError):
            if file_state(file.fd).nlink == 0:
                self._forget(file.identifier)

    def record_name(self, folder: FileRef, name: bytes, file: FileRef, guest: Hashable) -> None:
        """Record that ``guest`` gave ``file`` the name ``name`` in ``folder``."""
        self._handle_store.add(file.identifier, folder.identifier, name, guest)

    def refresh(self, found: FileRef) -> FileRef:
        """Return the same file with its present state.

        Raises OSError if its state cannot be read.
        """
        return found._replace(state=file_state(found.fd))

    def _parent(self, folder: FileRef) -> FileRef:
        if folder.identifier == self.root:
            return folder
        for parent, _ in self._handle_store.locations(folder.identifier):
            with contextlib.suppress(OSError):
                return self.find(parent)
        raise _stale()

    def _find(self, file: Identifier, depth: int) -> FileRef:
        if file == self.root:
            return FileRef(self._root_fd, file, file_state(self._root_fd))
        fd = self._open.get(file)
        if fd is not None:
            self._open.move_to_end(file)
            found = FileRef(fd, file, file_state(fd))
            if found.state.nlink == 0:
                self._forget(file)
                raise _stale()
            return found
        if depth:
            for parent, name in self._handle_store.locations(file):
                try:
                    folder = self._find(parent, depth - 1)
                    found = self._cache(open_beneath(folder.fd, name, _REFERENCE))
                    if found.identifier == file:
                        return found
                except OSError as error:
                    if error.errno not in _MOVED_ERRORS:
                        raise
                self._handle_store.remove(file, parent, name)
        raise _stale()

    def _cache(self, fd: int) -> FileRef:
        try:
            state = file_state(fd)
        except OSError:
            os.close(fd)
            raise
        file = self._identify(state)
        if file in self._open:
            os.close(fd)
            fd = self._open[file]
        self._open[file] = fd
        self._open.move_to_end(file)
        while len(self._open) > NFS_OPEN_FILES_MAX:
            _, oldest = self._open.popitem(last=False)
            os.close(oldest)
        return FileRef(fd, file, state)

    def _forget(self, file: Identifier) -> None:
        self._handle_store.forget(file)
        fd = self._open.pop(file, None)
        if fd is not None:
            os.close(fd)

    def _identify(self, state: FileState) -> Identifier:
        return Identifier(self.number, state.ino, *state.btime)


def _stale() -> OSError:
    return OSError(errno.ESTALE, os.strerror(errno.ESTALE))
