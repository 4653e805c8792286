"""A context's control sockets: where its programs come in."""

from __future__ import annotations

import logging
import os
import socket
from functools import partial
from pathlib import Path

from .._linux.folders import file_mode, working_in
from ..eventloop.acceptor import Acceptor
from ..eventloop.loop import EventLoop
from ..fabric import Context, EndpointKind
from ..model.constants import VMADDR_CID_HOST
from ..pass_rights import refuse
from ..state_folder import SEQPACKET, STREAM
from .broker import Broker
from .folder_removal import Trash
from .limits import CONTROL_BACKLOG_MAX

log = logging.getLogger(__name__)

_DOORS = (
    (EndpointKind.STREAM, STREAM, socket.SOCK_STREAM),
    (EndpointKind.SEQPACKET, SEQPACKET, socket.SOCK_SEQPACKET),
)


class ContextListeners:
    """The folder of one context and the two sockets in it.

    Programs that may connect to the sockets may be programs of the context: those of the virtual
    machine's owner for a guest, the fabric's for the hypervisor's services, everybody's who can
    enter the state folder for the host.  The folder is vsockd's own: nobody else can add anything
    to it, or put another file in a socket's place.
    """

    def __init__(
        self,
        loop: EventLoop,
        broker: Broker,
        context: Context,
        folder: Path,
        trash: Trash,
    ) -> None:
        """Make them.  ``folder`` leads to theirs, also when that is moved or replaced.

        OSError when they cannot be made.
        """
        self._folder = folder
        self._trash = trash
        self._doors: list[Acceptor] = []
        is_host = context.cid == VMADDR_CID_HOST
        if folder.is_dir():  # what could not be removed before
            trash.discard(folder)
        folder.mkdir(mode=0o700)
        try:
            for kind, name, sock_type in _DOORS:
                listener = socket.socket(socket.AF_UNIX, sock_type | socket.SOCK_NONBLOCK)
                admit = partial(broker.admit, context, kind)
                who = f"a program of context {context.cid}"
                self._doors.append(Acceptor(loop, listener, who, admit))
                # A client can see what its connection was bound to: so that is no path.
                with working_in(folder), file_mode(0o666 if is_host else 0o600):
                    listener.bind(name)
                # Connections inherit both: the kernel tells who writes each request, and takes no
                # descriptors but those that datagram requests and ends of records come with.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
                if kind is EndpointKind.STREAM:
                    refuse(listener)
                if context.is_guest and context.owner != os.geteuid():
                    os.chown(folder / name, context.owner, -1, follow_symlinks=False)
                listener.listen(CONTROL_BACKLOG_MAX)
            if is_host:
                folder.chmod(0o755)
            elif context.is_guest:
                folder.chmod(0o711)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Let nobody in any more, and remove the folder."""
        for door in self._doors:
            door.close()
        remove(self._folder, self._trash)


def remove(folder: Path, trash: Trash) -> None:
    """Remove a context's folder, whatever is in it."""
    try:
        for _, name, _ in _DOORS:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
    except FileNotFoundError:
        pass
    except OSError:
        try:
            trash.discard(folder)
        except OSError as error:
            log.warning("%s stays: %s", folder, error.strerror)
