"""Detect that the state folder, or a file that programs need in it, was removed or replaced."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Collection
from pathlib import Path

from .._linux.libc import check, libc
from ..eventloop.loop import EventLoop

# inotify(7)
_IN_MOVED_FROM, _IN_DELETE, _IN_DELETE_SELF, _IN_MOVE_SELF = 0x40, 0x200, 0x400, 0x800
_IN_UNMOUNT, _IN_Q_OVERFLOW, _IN_IGNORED, _IN_ONLYDIR = 0x2000, 0x4000, 0x8000, 0x0100_0000
_OF_A_NAME = _IN_MOVED_FROM | _IN_DELETE
_OF_THE_FOLDER = _IN_DELETE_SELF | _IN_MOVE_SELF | _IN_UNMOUNT | _IN_Q_OVERFLOW | _IN_IGNORED
_EVENT = struct.Struct("iIII")
_MOST = 65_536


class FolderWatch:
    """A watch on moves and removals of ``folder`` and ``names`` in it, which calls ``changed``.

    Raises OSError when it cannot watch.
    """

    def __init__(
        self, loop: EventLoop, folder: Path, names: Collection[str], changed: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._names = {os.fsencode(name) for name in names}
        self._changed = changed
        self._fd = check(libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
        mask = _OF_A_NAME | _IN_DELETE_SELF | _IN_MOVE_SELF | _IN_ONLYDIR
        try:
            check(libc.inotify_add_watch(self._fd, os.fsencode(folder), mask))
        except OSError:
            os.close(self._fd)
            raise
        loop.watch(self._fd, self._ready)

    def close(self) -> None:
        """Stop watching."""
        self._loop.unwatch(self._fd)
        os.close(self._fd)

    def _ready(self, events: int) -> None:
        data = os.read(self._fd, _MOST)
        while data:
            _, mask, _, size = _EVENT.unpack_from(data)
            name = data[_EVENT.size : _EVENT.size + size].rstrip(b"\0")
            data = data[_EVENT.size + size :]
            if mask & _OF_THE_FOLDER or name in self._names:
                self._changed()
                return
