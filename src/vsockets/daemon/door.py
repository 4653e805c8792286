"""A context's control sockets: where its programs come in."""

from __future__ import annotations

import os
import shutil
import socket
from functools import partial
from pathlib import Path

from ..constants import VMADDR_CID_HOST
from ..fabric import Context, Kind
from ..limits import CONTROL_BACKLOG
from ..state_folder import SEQPACKET, STREAM, short_path
from .accepting import Acceptor
from .broker import Broker
from .loop import Loop

_DOORS = (
    (Kind.STREAM, STREAM, socket.SOCK_STREAM),
    (Kind.SEQPACKET, SEQPACKET, socket.SOCK_SEQPACKET),
)


class Doors:
    """The folder of one context and the two sockets in it.

    Who may enter the folder may be a program of the context: mode 0700 and the virtual
    machine's owner for a guest, the fabric's for the hypervisor's services; the host is
    everybody's who can enter the state folder.
    """

    def __init__(self, loop: Loop, broker: Broker, context: Context, folder: Path) -> None:
        self.folder = folder
        self._doors: list[Acceptor] = []
        folder.mkdir(mode=0o700)
        try:
            for kind, name, sock_type in _DOORS:
                listener = socket.socket(socket.AF_UNIX, sock_type | socket.SOCK_NONBLOCK)
                admit = partial(broker.admit, context, kind)
                who = f"a program of context {context.cid}"
                self._doors.append(Acceptor(loop, listener, who, admit))
                with short_path(folder / name) as path:
                    listener.bind(path)
                os.chmod(folder / name, 0o666)
                # Connections inherit it: the kernel tells who writes each request.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
                listener.listen(CONTROL_BACKLOG)
            if context.cid == VMADDR_CID_HOST:
                folder.chmod(0o755)
            elif context.is_guest and context.owner != os.geteuid():
                os.chown(folder, context.owner, -1)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Let nobody in any more, and remove the folder."""
        for door in self._doors:
            door.close()
        shutil.rmtree(self.folder, ignore_errors=True)
