"""A context's control sockets: where its programs come in."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
from pathlib import Path

from ..fabric import Context, Kind
from ..limits import CONTROL_BACKLOG
from ..state_folder import SEQPACKET, STREAM, short_path
from .broker import Broker
from .loop import Loop

log = logging.getLogger(__name__)

_DOORS = (
    (Kind.STREAM, STREAM, socket.SOCK_STREAM),
    (Kind.SEQPACKET, SEQPACKET, socket.SOCK_SEQPACKET),
)

#: How long to look away when there is no descriptor left for another program, in seconds.
_PAUSE = 0.05


class Doors:
    """The folder of one context and the two sockets in it.

    Who may enter the folder may be a program of the context: mode 0700 and the virtual
    machine's owner for a guest; the host is everybody's who can enter the state folder.
    """

    def __init__(self, loop: Loop, broker: Broker, context: Context, folder: Path) -> None:
        self.folder = folder
        self._loop = loop
        self._broker = broker
        self._context = context
        self._listeners: list[socket.socket] = []
        folder.mkdir(mode=0o700)
        try:
            self._open_all()
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Let nobody in any more, and remove the folder."""
        for listener in self._listeners:
            self._loop.unwatch(listener.fileno())
            listener.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _open_all(self) -> None:
        folder, context = self.folder, self._context
        for kind, name, sock_type in _DOORS:
            listener = socket.socket(socket.AF_UNIX, sock_type | socket.SOCK_NONBLOCK)
            self._listeners.append(listener)
            with short_path(folder / name) as path:
                listener.bind(path)
            os.chmod(folder / name, 0o666)
            listener.listen(CONTROL_BACKLOG)
            self._open(listener, kind)
        if not context.is_guest:
            folder.chmod(0o755)
        elif context.owner != os.geteuid():
            os.chown(folder, context.owner, -1)

    def _open(self, listener: socket.socket, kind: Kind) -> None:
        fd = listener.fileno()
        accept, admit, context = listener._accept, self._broker.admit, self._context  # type: ignore[attr-defined]

        def enter(events: int) -> None:
            try:
                accepted, _ = accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    raise
                log.warning("a program of context %d waits: %s", context.cid, error)
                self._loop.unwatch(fd)
                self._loop.call_later(_PAUSE, reopen)
                return
            admit(accepted, context, kind)

        def reopen() -> None:
            if listener.fileno() >= 0:
                self._loop.watch(fd, enter)

        self._loop.watch(fd, enter)
