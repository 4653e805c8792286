"""Hybrid vsock's server side: a guest's ports behind a unix socket, for tools that know that.

Who connects to it is a program of the host like any other, and says which port he wants; a stream
so made is one of the fabric's, and vsockd is out of it.  The other way, a guest that connects to a
port of the host where no program of the fabric listens, comes to the unix socket of that port, if
there is one.  Its program's socket leads to vsockd already, so another process joins the two.
"""

from __future__ import annotations

import _socket
import contextlib
import logging
import os
import socket
import stat
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from socket import MSG_DONTWAIT, MSG_PEEK

from .. import logs
from .._linux.folders import SocketFile, can_others_change
from ..eventloop.acceptor import Acceptor
from ..eventloop.loop import EventLoop
from ..fabric import Context, Credentials, Endpoint, EndpointKind, Trust
from ..limits import HYBRID_LINE_MAX_BYTES
from ..model.buffers import BufferSizes
from ..pass_rights import refuse
from ..protocol import Op, Record, Request, RequestFlag
from ..protocol.hybrid import Connect, ok_line, port_name
from .broker import Broker
from .channel import Channel
from .credentials import peer_credentials
from .limits import CONTROL_BACKLOG_MAX
from .pending_connects import HandoffLink
from .run_as import acting_as

log = logging.getLogger(__name__)

_LOOK = int(MSG_DONTWAIT | MSG_PEEK)
_TAKE = int(MSG_DONTWAIT)


class HybridChannel(Channel):
    """A program of the host that speaks the handshake instead of the wire protocol."""

    asks_once = True
    offer_flags = int(RequestFlag.OK_LINE)

    def __init__(self, sock: _socket.socket, host: Context, cid: int) -> None:
        """``cid``: whose ports it can ask for."""
        super().__init__(sock, host, EndpointKind.STREAM, peer_credentials(sock))
        self._cid = cid
        self._line = Connect()

    def read(self) -> bytes:
        """The line, as the request that it is; no bytes when it is none."""
        line, sock = self._line, self.sock
        if line.port is not None:
            return b""
        try:
            # Only the line is taken: what follows it is for the guest.
            while line.port is None:
                sock.recv(line.take(sock.recv(HYBRID_LINE_MAX_BYTES, _LOOK)), _TAKE)
        except BlockingIOError:
            raise
        except OSError as error:
            pid = self.credentials.pid
            log.info("pid %d: %s", pid, error.strerror, extra=logs.by(self.party))
            return b""
        wanted = self._cid, line.port
        return Request(Op.CONNECT, 0, 0, 0, *wanted, 0, *BufferSizes()).encode()

    def send(self, record: bytes) -> None:
        """Say OK, or nothing: then it is closed."""
        answer = Record.decode(record)
        if not answer.status:
            super().send(ok_line(answer.local_port))


class HybridListener:
    """The unix socket ``path`` of a guest, for its owner's programs, and what is beside it.

    Where other users than vsockd's can change the folder, as the owner usually can, it is made and
    removed with the owner's rights alone.
    """

    def __init__(self, loop: EventLoop, broker: Broker, context: Context, path: Path) -> None:
        """OSError when it cannot be."""
        self._loop = loop
        self._broker = broker
        self._context = context
        self._host = broker.fabric.contexts.host
        self._relay: _Relay | None = None
        try:
            self._file = SocketFile(path)
        except OSError as error:
            at = f": {error.filename}" if error.filename else ""
            raise OSError(error.errno, f"hybrid: {path}{at}: {error.strerror}") from None
        self._as_owner = can_others_change(self._file.folder)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        refuse(listener)
        try:
            with self._with_rights():
                self._file.bind(listener, 0o600)
            if not self._as_owner and context.owner != os.geteuid():
                self._file.give(context.owner)
        except OSError as error:
            listener.close()
            self._file.remove()
            self._file.close()
            whose = f" (for user {context.owner}, its owner)" if self._as_owner else ""
            raise OSError(error.errno, f"hybrid: {path}: {error.strerror}{whose}") from None
        listener.listen(CONTROL_BACKLOG_MAX)
        self._acceptor = Acceptor(loop, listener, f"a program at {path}", self._admit)
        context.beyond = self._find

    def close(self) -> None:
        """Let nobody in any more, and remove it."""
        self._context.beyond = None
        self._acceptor.close()
        with contextlib.suppress(OSError), self._with_rights():
            self._file.remove()
        self._file.close()
        if self._relay is not None:
            self._relay.close()

    def _with_rights(self) -> AbstractContextManager[None]:
        return acting_as(self._context.owner) if self._as_owner else contextlib.nullcontext()

    def _admit(self, fd: int) -> None:
        sock = _socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
        self._broker.take(HybridChannel(sock, self._host, self._context.cid))

    # Where nobody of the fabric listens

    def _find(self, kind: EndpointKind, port: int) -> Endpoint | None:
        """The endpoint that the unix socket of the host's ``port`` is, if there is one."""
        if kind is not EndpointKind.STREAM:
            return None
        try:
            name = port_name(self._file.name, port)
            found = os.stat(name, dir_fd=self._file.folder, follow_symlinks=False)
        except OSError:
            return None
        # Somebody else's may be there where everybody may make files, and a link leads anywhere.
        if not stat.S_ISSOCK(found.st_mode) or found.st_uid not in (self._context.owner, 0):
            return None
        if self._relay is None or not self._relay.is_open:
            self._relay = _Relay(self._loop, self._broker, self._file, self._context.owner)
        user, group = found.st_uid, found.st_gid
        return Endpoint(
            kind,
            self._host,
            self._host.cid,
            port,
            Credentials(self._relay.pid, user, group),
            trust=Trust(user, False, self._broker.fabric.settings.host_domains),
            handle=self._relay,
            listening=True,
            undecided=True,
        )


class _Relay(HandoffLink):
    """The process that connects there (:mod:`vsockets.devices.hybrid.relay`)."""

    def __init__(self, loop: EventLoop, broker: Broker, file: SocketFile, user: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # -P: nothing is loaded from a folder that happens to be the current one.
        command = [sys.executable, "-P", "-m", "vsockets.devices.hybrid.relay"]
        command += [file.name, str(file.folder), str(user)]
        try:
            with theirs:
                process = subprocess.Popen(command, stdin=theirs.fileno(), pass_fds=[file.folder])
        except OSError:
            ours.close()
            raise
        self.pid = process.pid
        super().__init__(loop, broker, broker.fabric.contexts.host, ours)
