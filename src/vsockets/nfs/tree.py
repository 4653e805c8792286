"""The files of an export, found by handle; nothing outside the export is opened."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

from .exports import Export
from .handles import HandleStore, Identifier
from .limits import NFS_DIRECTORY_DEPTH_MAX, NFS_OPEN_FILES_MAX
from .syscalls import FileState, file_state, open_beneath

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

    The tree owns the descriptors in its results; they are valid for one call."""

    def __init__(self, export: Export, handle_store: HandleStore) -> None:
        """Open the export's directory.

        Raises OSError.
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

        Raises OSError (ESTALE) if it is at none of its recorded locations.
        """
        return self._find(file, NFS_DIRECTORY_DEPTH_MAX)

    def look_up(self, folder: FileRef, name: bytes, guest: Hashable) -> FileRef:
        """Return the file ``name`` in ``folder`` and record its location for ``guest``.

        Raises OSError.
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

        Raises OSError.
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
