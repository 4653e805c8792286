"""A context's control sockets, which its programs connect to."""

from __future__ import annotations

import logging
import os
import socket
from functools import partial
from pathlib import Path

from .._linux.folders import file_mode, working_in
from .._linux.sockets import refuse_descriptors
from ..eventloop.acceptor import Acceptor
from ..eventloop.loop import EventLoop
from ..fabric import Context, EndpointKind
from ..model.constants import VMADDR_CID_HOST
from ..state_folder import SEQPACKET, STREAM
from .broker import Broker
from .folder_removal import Trash
from .limits import CONTROL_BACKLOG_MAX

log = logging.getLogger(__name__)

_CONTROL_SOCKETS = (
    (EndpointKind.STREAM, STREAM, socket.SOCK_STREAM),
    (EndpointKind.SEQPACKET, SEQPACKET, socket.SOCK_SEQPACKET),
)


class ContextListeners:
    """The folder of one context and the two control sockets in it.

    Permission to connect to the sockets makes a process a program of the context: for a guest,
    processes of the virtual machine's owner; for the hypervisor, those of the fabric's owner; for
    the host, every process that can enter the state folder.  The folder belongs to vsockd: no
    other user can add files to it, or replace a socket.
    """

    def __init__(
        self,
        loop: EventLoop,
        broker: Broker,
        context: Context,
        folder: Path,
        trash: Trash,
    ) -> None:
        """Create the folder and the sockets.

        ``folder`` is a path through a descriptor, valid also after the state folder was moved or
        replaced.

        Raises OSError when they cannot be created.
        """
        self._folder = folder
        self._trash = trash
        self._acceptors: list[Acceptor] = []
        is_host = context.cid == VMADDR_CID_HOST
        if folder.is_dir():  # an earlier context's, which could not be removed
            trash.discard(folder)
        folder.mkdir(mode=0o700)
        try:
            for kind, name, sock_type in _CONTROL_SOCKETS:
                listener = socket.socket(socket.AF_UNIX, sock_type | socket.SOCK_NONBLOCK)
                admit = partial(broker.admit, context, kind)
                who = f"a program of context {context.cid}"
                self._acceptors.append(Acceptor(loop, listener, who, admit))
                # Clients see the bound name in getpeername(): the name alone discloses no path.
                with working_in(folder), file_mode(0o666 if is_host else 0o600):
                    listener.bind(name)
                # Connections inherit both options: the kernel attaches each writer's credentials,
                # and descriptors are refused except where datagram requests and records have them.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
                if kind is EndpointKind.STREAM:
                    refuse_descriptors(listener)
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
        """Close the sockets and remove the folder."""
        for acceptor in self._acceptors:
            acceptor.close()
        remove(self._folder, self._trash)


def remove(folder: Path, trash: Trash) -> None:
    """Remove a context's folder and everything in it."""
    try:
        for _, name, _ in _CONTROL_SOCKETS:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
    except FileNotFoundError:
        pass
    except OSError:
        try:
            trash.discard(folder)
        except OSError as error:
            log.warning("cannot remove %s: %s", folder, error.strerror)
