"""Folders and unix sockets whose paths other users may be able to change.

A path is resolved once, component by component.  The folder that it leads to is then used through
a descriptor, so that no other user can insert a symbolic link afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

#: The largest number of symbolic links in one path, as in the kernel (MAXSYMLINKS).
_MOST_LINKS = 40

#: The inode of the initial user namespace (linux/proc_ns.h), and the user id that another namespace
#: sees for users that it does not map.
_FIRST_USER_NAMESPACE = 0xEFFFFFFD
_UNMAPPED = 65_534


def describe(error: OSError) -> str:
    """Return the text of an OSError without its number, after the path of its file."""
    text = error.strerror or str(error)
    if error.filename is None or isinstance(error.filename, int):
        return text
    return f"{shown_path(os.fsdecode(error.filename))}: {text}"


def shown_path(path: str | os.PathLike[str]) -> str:
    """Return ``path`` for messages: ``/proc/self/fd/N`` becomes the path of that folder."""
    path = os.fspath(path)
    held = re.match(r"/proc/self/fd/\d+", path)
    if held is not None:
        with contextlib.suppress(OSError):
            return os.readlink(held[0]) + path[held.end() :]
    return path


def open_folder(path: Path, *, private: bool = False, create: int | None = None) -> int:  # noqa: C901 - checks in order
    """Open the folder ``path`` with O_PATH, and return its descriptor.

    A symbolic link in the path is followed only if no other user can change the link.  A file
    system in user space (FUSE) is entered only if root or this user has mounted it: that of another
    user could block this process.

    With ``private``, a path of which another user can change any part is refused.  With ``create``,
    missing folders are created, the last one with the mode ``create``.

    Raises OSError, whose ``filename`` is the part of the path that was refused.
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
    """The file of a unix socket, in a folder that is opened once and used by its descriptor.

    Raises OSError as :func:`open_folder` does.
    """

    def __init__(
        self, path: Path, folder: int | None = None, made: Sequence[int] | None = None
    ) -> None:
        """Open the folder, unless ``folder`` is its descriptor.

        ``made`` is the device and inode of a file that another process has bound.
        """
        self.where = path  #: the path for messages
        self.name = path.name
        self.folder = open_folder(path.absolute().parent) if folder is None else folder
        #: device and inode of the file that :meth:`bind` has created
        self.made = None if made is None else (made[0], made[1])

    def close(self) -> None:
        """Close the folder's descriptor.  The file stays."""
        os.close(self.folder)

    @property
    def path(self) -> str:
        """A path to the file that fits a socket's address, valid until :meth:`close`."""
        return f"/proc/self/fd/{self.folder}/{self.name}"

    def bind(self, sock: socket.socket, mode: int | None = None) -> None:
        """Bind ``sock`` to the file; replace an existing socket file that no process has open.

        ``mode`` is the new file's permission bits; by default the process's umask applies.

        Raises OSError(EADDRINUSE) if another file has the name.
        """
        remove_stale(self.name, self.folder)
        with contextlib.nullcontext() if mode is None else file_mode(mode):
            sock.bind(self.path)
        self.made = self._identity()

    def remove(self) -> None:
        """Remove the file if it is still the one that :meth:`bind` created."""
        with contextlib.suppress(OSError):
            if self.made is not None and self._identity() == self.made:
                os.unlink(self.name, dir_fd=self.folder)
        self.made = None

    def give(self, user: int) -> None:
        """Make ``user`` (a user id) the file's owner.

        The caller has to make sure that no other user can replace the file.
        """
        os.chown(self.name, user, -1, dir_fd=self.folder, follow_symlinks=False)

    def _identity(self) -> tuple[int, int]:
        found = os.stat(self.name, dir_fd=self.folder, follow_symlinks=False)
        return found.st_dev, found.st_ino


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Make ``folder`` the current directory during the with block.

    For a process with one thread only, because threads share the current directory.
    """
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
    """Give the files of sockets that this process binds during the with block the mode ``mode``."""
    usual = os.umask(0o777 & ~mode)
    try:
        yield
    finally:
        os.umask(usual)


def remove_stale(name: str, folder: int | None = None) -> None:
    """Remove the unix socket ``name`` if no process has it open.

    ``folder`` is the descriptor of the folder, by default the current directory.  A file that is
    not a unix socket is kept; bind() then fails with EADDRINUSE.
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
            pass  # another process has it open, of another type, or it is not accessible


def _require_answering(path: Path, folder: int, before: str) -> str:
    """Require that ``folder`` is not in another user's file system in user space.

    Returns the id of the mount that ``folder`` is in, as text.  The check is skipped if the mount
    is ``before``, the id of a mount already checked.  Nothing here sends a request to the file
    system.

    Raises PermissionError if ``folder`` is in such a file system.
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
    """Return whether users other than root and this one may add or remove names.

    ``folder`` is the descriptor of the folder.
    """
    found = os.fstat(folder)
    return found.st_uid not in _trusted() or bool(found.st_mode & 0o022)


def _require_safe(path: Path, folder: int) -> None:
    found = os.fstat(folder)
    # In a sticky folder other users can add names, but change only their own.
    shared = found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX
    if shared or found.st_uid not in _trusted():
        why = "other users can change its content"
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
