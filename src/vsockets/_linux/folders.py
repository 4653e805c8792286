"""Folders and the unix sockets in them, where other users may change what a path leads to.

A path is resolved once, component by component, and what follows is done relative to the descriptor
of the folder that was reached: no other user can put a symbolic link in between.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat
from collections import deque
from collections.abc import Iterator
from pathlib import Path

_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

#: Symbolic links in one path, as in the kernel (MAXSYMLINKS).
_MOST_LINKS = 40

#: The inode of the first user namespace (linux/proc_ns.h), and the user that stands for all who are
#: in none of those that the kernel shows to another one.
_FIRST_USER_NAMESPACE = 0xEFFFFFFD
_UNMAPPED = 65_534


def open_folder(path: Path, *, private: bool = False, create: int | None = None) -> int:
    """Open the folder ``path`` as a place (O_PATH), and return its descriptor.

    A symbolic link on the way is followed only where no other user can change it; a file system in
    user space (FUSE) is entered only if it is root's or ours, as others answer when they like.

    With ``private`` no other user may be able to change anything on the way either: then the path
    goes on leading there.  With ``create`` missing folders are made, the last one with that mode.

    Raises OSError; its ``filename`` is the part of the path that is to blame.
    """
    folder, reached = os.open("/", _FOLDER), Path("/")
    parts = deque(path.absolute().parts[1:])
    links, mount = 0, ""
    try:
        while parts:
            if private:
                _require_safe(reached, folder)
            mount = _require_answering(reached, folder, mount)
            part = parts.popleft()
            try:
                inner = os.open(part, _FOLDER, dir_fd=folder)
            except FileNotFoundError:
                if create is None:
                    raise
                os.mkdir(part, 0o755 if parts else create, dir_fd=folder)
                parts.appendleft(part)
                continue
            except NotADirectoryError:
                target = Path(_read_link(folder, part, reached))
                links += 1
                if links > _MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), part) from None
                parts.extendleft(reversed(target.parts))
                if target.is_absolute():
                    os.close(folder)
                    folder, reached = os.open(parts.popleft(), _FOLDER), Path("/")
                continue
            os.close(folder)
            folder, reached = inner, reached / part
        if private:
            _require_safe(reached, folder)
        _require_answering(reached, folder, mount)
    except BaseException as error:
        os.close(folder)
        if isinstance(error, OSError) and error.filename is not None:
            error.filename = os.fspath(reached / os.fsdecode(error.filename))
        raise
    return folder


class SocketFile:
    """The file of a unix socket, in a folder that is opened once.

    Raises OSError, as :func:`open_folder`.
    """

    def __init__(self, path: Path) -> None:
        self.where = path  #: as it was given, for messages
        self.name = path.name
        self.folder = open_folder(path.absolute().parent)
        self._made: tuple[int, int] | None = None

    def close(self) -> None:
        """Close the folder's descriptor.  The file stays."""
        os.close(self.folder)

    @property
    def path(self) -> str:
        """A path to it, short enough for a socket's address, as long as this is open."""
        return f"/proc/self/fd/{self.folder}/{self.name}"

    def bind(self, sock: socket.socket, mode: int | None = None) -> None:
        """Bind ``sock`` there, in place of a socket that no process holds any more.

        ``mode``: the file's, from its first moment on; by default what the process's usual is.
        OSError EADDRINUSE when something else is there.
        """
        remove_stale(self.name, self.folder)
        with contextlib.nullcontext() if mode is None else file_mode(mode):
            sock.bind(self.path)
        self._made = self._identity()

    def remove(self) -> None:
        """Remove the file if it is still the one that was made."""
        with contextlib.suppress(OSError):
            if self._made is not None and self._identity() == self._made:
                os.unlink(self.name, dir_fd=self.folder)
        self._made = None

    def give(self, user: int) -> None:
        """Make ``user`` its owner.  Only where no other user can put another file in its place."""
        os.chown(self.name, user, -1, dir_fd=self.folder, follow_symlinks=False)

    def _identity(self) -> tuple[int, int]:
        found = os.stat(self.name, dir_fd=self.folder, follow_symlinks=False)
        return found.st_dev, found.st_ino


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Have ``folder`` as the current directory; for a process of one thread."""
    before = os.open(".", _FOLDER)
    try:
        os.chdir(folder)
        try:
            yield
        finally:
            os.fchdir(before)
    finally:
        os.close(before)


@contextlib.contextmanager
def file_mode(mode: int) -> Iterator[None]:
    """Give sockets that the process binds in this context ``mode``, from the first moment on."""
    usual = os.umask(0o777 & ~mode)
    try:
        yield
    finally:
        os.umask(usual)


def remove_stale(name: str, folder: int | None = None) -> None:
    """Remove the unix socket ``name`` of ``folder`` if no process holds it any more.

    ``folder`` is by default the current one.  Where there is something else bind() says so:
    EADDRINUSE.
    """
    try:
        if not stat.S_ISSOCK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(name if folder is None else f"/proc/self/fd/{folder}/{name}")
        except ConnectionRefusedError:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=folder)
        except OSError:
            pass  # of another type, and open; or not ours


def _require_answering(path: Path, folder: int, before: str) -> str:
    """Raise PermissionError if ``folder`` is in another user's file system in user space.

    Returns the number of its mount; ``before`` is one that was looked at.  Nothing is asked of the
    file system.
    """
    mount = Path(f"/proc/self/fdinfo/{folder}").read_text().partition("mnt_id:")[2].split()[0]
    if mount != before:
        mounts = Path("/proc/self/mountinfo").read_text(errors="replace")
        line = re.search(rf"^{mount} .* - (\S+) \S+ (\S+)$", mounts, re.MULTILINE)
        if line is not None and line[1].startswith("fuse"):
            user = re.search(r"\buser_id=(\d+)", line[2])
            if user is None or int(user[1]) not in _trusted():
                why = "a file system in user space of another user"
                raise PermissionError(errno.EPERM, why, os.fspath(path))
    return mount


def _trusted() -> set[int]:
    trusted = {0, os.geteuid()}
    if os.stat("/proc/self/ns/user").st_ino != _FIRST_USER_NAMESPACE:
        trusted.add(_UNMAPPED)
    return trusted


def can_others_change(folder: int) -> bool:
    """Return whether users other than root and this one may add or remove names in ``folder``."""
    found = os.fstat(folder)
    return found.st_uid not in _trusted() or bool(found.st_mode & 0o022)


def _require_safe(path: Path, folder: int) -> None:
    found = os.fstat(folder)
    # In a sticky folder others can add names, and change none of ours.
    shared = found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX
    if shared or found.st_uid not in _trusted():
        why = "other users can change what is in it"
        raise PermissionError(errno.EPERM, why, os.fspath(path))


def _read_link(folder: int, name: str, reached: Path) -> str:
    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if not stat.S_ISLNK(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), name)
    _require_safe(reached, folder)
    if found.st_uid not in _trusted():
        why = f"a symbolic link of user {found.st_uid} (expected a folder)"
        raise PermissionError(errno.EPERM, why, name)
    return os.readlink(name, dir_fd=folder)
