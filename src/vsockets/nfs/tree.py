"""An export's files, found by what identifies them; nothing outside the export is ever opened."""

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
from .handle_store import HandleStore
from .handles import Identifier
from .limits import NFS_DIRECTORY_DEPTH_MAX, NFS_OPEN_FILES_MAX
from .syscalls import FileState, open_beneath, state_of

#: What says that a file is not where it was.
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.EXDEV, errno.ELOOP)

_PLACE = os.O_PATH | os.O_NOFOLLOW


class FileRef(NamedTuple):
    """A file: a descriptor that is its place only (O_PATH), and how it is."""

    fd: int
    identifier: Identifier
    state: FileState

    @property
    def path(self) -> str:
        """A path of the file itself, also of a symbolic link."""
        return f"/proc/self/fd/{self.fd}"

    @property
    def is_folder(self) -> bool:
        """Whether names can be looked up in it."""
        return stat.S_ISDIR(self.state.mode)


class Tree:
    """One export.  Descriptors in what it finds are its own, and good for a call's duration."""

    def __init__(self, export: Export, places: HandleStore) -> None:
        """Raises OSError."""
        self.export = export
        self._places = places
        digest = hashlib.blake2b(os.fsencode(export.path), digest_size=8).digest()
        self.number = int.from_bytes(digest)
        self._root_fd = os.open(export.path, os.O_PATH | os.O_DIRECTORY)
        self._open: OrderedDict[Identifier, int] = OrderedDict()
        self.root = self._identify(state_of(self._root_fd))

    def close(self) -> None:
        """Let go of all files."""
        for fd in (*self._open.values(), self._root_fd):
            os.close(fd)
        self._open.clear()

    def find(self, file: Identifier) -> FileRef:
        """Raises OSError ESTALE when it is not where it was."""
        return self._find(file, NFS_DIRECTORY_DEPTH_MAX)

    def look_up(self, folder: FileRef, name: bytes, guest: Hashable) -> FileRef:
        """What is called ``name`` in ``folder``, for ``guest``.  Raises OSError."""
        if name == b".":
            return folder
        if name == b"..":
            return self._parent(folder)
        fd = open_beneath(folder.fd, name, _PLACE)
        found = self._keep(fd)
        self._places.add(found.identifier, folder.identifier, name, guest)
        return found

    def gone(self, folder: FileRef, name: bytes, file: FileRef) -> None:
        """``file`` is no longer called ``name`` in ``folder``."""
        self._places.remove(file.identifier, folder.identifier, name)
        with contextlib.suppress(OSError):
            if state_of(file.fd).nlink == 0:
                self._forget(file.identifier)

    def arrived(self, folder: FileRef, name: bytes, file: FileRef, guest: Hashable) -> None:
        """``file`` is now called ``name`` in ``folder``, by ``guest``."""
        self._places.add(file.identifier, folder.identifier, name, guest)

    def again(self, found: FileRef) -> FileRef:
        """The same file, as it is by now.  Raises OSError."""
        return found._replace(state=state_of(found.fd))

    def _parent(self, folder: FileRef) -> FileRef:
        if folder.identifier == self.root:
            return folder
        for parent, _ in self._places.of(folder.identifier):
            with contextlib.suppress(OSError):
                return self.find(parent)
        raise _stale()

    def _find(self, file: Identifier, depth: int) -> FileRef:
        if file == self.root:
            return FileRef(self._root_fd, file, state_of(self._root_fd))
        fd = self._open.get(file)
        if fd is not None:
            self._open.move_to_end(file)
            found = FileRef(fd, file, state_of(fd))
            if found.state.nlink == 0:
                self._forget(file)
                raise _stale()
            return found
        if depth:
            for parent, name in self._places.of(file):
                try:
                    folder = self._find(parent, depth - 1)
                    found = self._keep(open_beneath(folder.fd, name, _PLACE))
                    if found.identifier == file:
                        return found
                except OSError as error:
                    if error.errno not in _NOT_THERE:
                        raise
                self._places.remove(file, parent, name)
        raise _stale()

    def _keep(self, fd: int) -> FileRef:
        try:
            state = state_of(fd)
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
        self._places.forget(file)
        fd = self._open.pop(file, None)
        if fd is not None:
            os.close(fd)

    def _identify(self, state: FileState) -> Identifier:
        return Identifier(self.number, state.ino, *state.born)


def _stale() -> OSError:
    return OSError(errno.ESTALE, os.strerror(errno.ESTALE))
