"""Remove folders that may hold anything, in a thread, while vsockd serves.

Normally vsockd removes the few names it has made.  What else is in a folder, however much, however
deep, and even while its owner goes on adding to it, is renamed into a folder that only vsockd
enters, which takes no time, and is removed there.
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
    """The folder ``path``, made if it is missing, and what is to be removed in it."""

    def __init__(self, path: Path) -> None:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        self._path = path
        # Other names than those of an earlier vsockd, which may be there yet.
        self._names = (f"{secrets.token_hex(8)}.{number}" for number in count())
        self._wanted = threading.Event()
        self._thread: threading.Thread | None = None
        self._begun = False

    def discard(self, path: Path) -> None:
        """Rename ``path``, of the same file system, into the trash.  OSError."""
        os.rename(path, self._path / next(self._names))
        if self._begun:
            self.begin()

    def begin(self) -> None:
        """Remove what is there.  Called in the process that goes on: threads end with a fork."""
        self._begun = True
        if self._thread is None and os.listdir(self._path):
            self._thread = threading.Thread(target=self._run, name="trash", daemon=True)
            self._thread.start()
        self._wanted.set()

    def close(self) -> None:
        """Remove the folder; if something is in it yet, the next vsockd removes that."""
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
                        log.warning("%s stays: %s", self._path / name, error.strerror)

    def _remove(self, path: Path) -> None:
        """Remove ``path``; the folders in it become the trash's own, so that depth is no matter."""
        try:
            folder = os.open(path, _FOLDER)
        except NotADirectoryError:
            path.unlink()
            return
        try:
            # A process that is in the folder yet can add nothing to it any more.
            os.fchown(folder, os.geteuid(), -1)
            os.fchmod(folder, 0o700)
            with os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):  # what stays keeps the folder
                        if entry.is_dir(follow_symlinks=False):
                            name = self._path / next(self._names)
                            os.rename(entry.name, name, src_dir_fd=folder)
                        else:
                            os.unlink(entry.name, dir_fd=folder)
        finally:
            os.close(folder)
        path.rmdir()
