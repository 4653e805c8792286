"""Remove folders with arbitrary contents, in a thread, while vsockd serves.

Normally vsockd removes the few names it has created.  A folder with anything else in it, however
large and deep, and even while its owner keeps adding files, is renamed into a folder that only
vsockd can enter, which is quick, and is removed there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
from itertools import count
from pathlib import Path

log = logging.getLogger(__name__)

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Trash:
    """The trash folder at ``path``, created if missing, and the folders to be removed in it."""

    def __init__(self, path: Path) -> None:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        self._path = path
        # Random, to differ from names of an earlier vsockd that may still be in the folder.
        self._names = (f"{secrets.token_hex(8)}.{number}" for number in count())
        self._wanted = threading.Event()
        self._thread: threading.Thread | None = None
        self._begun = False

    def discard(self, path: Path) -> None:
        """Rename ``path``, on the same file system, into the trash folder.  Raises OSError."""
        os.rename(path, self._path / next(self._names))
        if self._begun:
            self.begin()

    def begin(self) -> None:
        """Start removing the contents, in a thread.  Call it after forking: threads do not fork."""
        self._begun = True
        if self._thread is None and os.listdir(self._path):
            self._thread = threading.Thread(target=self._run, name="trash", daemon=True)
            self._thread.start()
        self._wanted.set()

    def close(self) -> None:
        """Remove the trash folder; if it is not empty, the next vsockd removes its contents."""
        with contextlib.suppress(OSError):
            self._path.rmdir()

    def _run(self) -> None:
        hopeless: set[str] = set()
        while self._wanted.wait():
            self._wanted.clear()
            while names := set(os.listdir(self._path)) - hopeless:
                for name in names:
                    try:
                        self._remove(self._path / name)
                    except OSError as error:
                        hopeless.add(name)
                        log.warning("cannot remove %s: %s", self._path / name, error.strerror)

    def _remove(self, path: Path) -> None:
        """Remove ``path``; subfolders are moved up into the trash folder, to limit the depth."""
        try:
            folder = os.open(path, _FOLDER)
        except NotADirectoryError:
            path.unlink()
            return
        try:
            # A process that still has the folder open cannot add files to it after this.
            os.fchown(folder, os.geteuid(), -1)
            os.fchmod(folder, 0o700)
            with os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):  # rmdir then fails and is reported
                        if entry.is_dir(follow_symlinks=False):
                            name = self._path / next(self._names)
                            os.rename(entry.name, name, src_dir_fd=folder)
                        else:
                            os.unlink(entry.name, dir_fd=folder)
        finally:
            os.close(folder)
        path.rmdir()
