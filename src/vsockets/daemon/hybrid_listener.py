"""Hybrid vsock, server side: a guest's ports behind a unix socket, for tools that support it.

A client of the socket is a program of the host like any other, and names the guest's port in a
CONNECT line; the stream is one of the fabric's, and its bytes do not pass through vsockd.  In the
other direction, a guest that connects to a port of the host without a listener of the fabric is
connected to the unix socket of that port, if it exists.  Since the guest program's socket is
connected to vsockd already, a relay process copies between the two.
"""

from __future__ import annotations

import _socket
import contextlib
import ctypes
import errno
import logging
import os
import platform
import socket
import stat
import struct
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from socket import MSG_DONTWAIT, MSG_PEEK

from .. import logs
from .._linux.folders import SocketFile, can_others_change
from .._linux.libc import last_error, libc
from .._linux.sockets import refuse_descriptors
from ..eventloop.loop import Acceptor, EventLoop
from ..fabric import Context, Credentials, Endpoint, EndpointKind, Refused, Trust
from ..limits import HYBRID_LINE_MAX_BYTES
from ..model.buffers import BufferSizes
from ..protocol import Op, Record, Request, RequestFlag
from ..protocol.hybrid import Connect, ok_line, port_name
from .broker import Broker
from .channel import Channel
from .credentials import peer_credentials
from .device_link import HandoffLink
from .handover import Reader, Saved, Writer
from .in_flight import HYBRID, InFlight, Step
from .limits import CONTROL_BACKLOG_MAX

log = logging.getLogger(__name__)

_PEEK = int(MSG_DONTWAIT | MSG_PEEK)
_READ = int(MSG_DONTWAIT)


#: Number of setgroups(2), for one thread: the C library's function waits for all threads, and one
#: of them may be blocked by a file system.
_SETGROUPS = {"x86_64": 116, "aarch64": 159}

_NOBODY = 65_534
_UNCHANGED = ctypes.c_uint32(0xFFFF_FFFF)


class HybridChannel(Channel):
    """A program of the host that uses the hybrid handshake instead of vsockd's protocol."""

    connect_flags = int(RequestFlag.OK_LINE)
    has_requests = False  # the line is read in pieces

    def save(self, writer: Writer) -> Saved:
        """Return the channel's state for the next vsockd."""
        return {**super().save(writer), "cid": self._cid, "line": self._line.received}

    @classmethod
    def restore(cls, reader: Reader, saved: Saved) -> HybridChannel:
        """Return a channel that the previous vsockd has saved."""
        plain = Channel.restore(reader, saved)
        channel = cls(plain.sock, plain.context, saved["cid"], plain.credentials)
        channel.watch = plain.watch
        if saved["line"]:
            channel._line.take(saved["line"])
        return channel

    def __init__(
        self, sock: _socket.socket, host: Context, cid: int, credentials: Credentials
    ) -> None:
        """Serve a client that may connect to ports of the guest with ``cid``."""
        super().__init__(sock, host, EndpointKind.STREAM, credentials)
        self._cid = cid
        self._line = Connect()
        self._has_read = False  # True: this vsockd has done the READ of the request being served

    def begin(self, in_flight: InFlight) -> None:
        """Record that the line, or a part of it, is read next."""
        in_flight.begin(self.sock.fileno(), self._cid, HYBRID)

    @property
    def has_part(self) -> bool:
        """True if a part of the line has been read."""
        return self._line.port is None and bool(self._line.received)

    def read(self) -> bytes:
        """Return the CONNECT line as a request; no bytes when it is invalid."""
        if self._line.port is not None:
            return b""
        try:
            port = self._read_line()
        except BlockingIOError:
            raise
        except OSError as error:
            pid = self.credentials.pid
            log.info("pid %d: %s", pid, error.strerror, extra=logs.by(self.party))
            return b""
        wanted = self._cid, port
        return Request(Op.CONNECT, 0, 0, 0, *wanted, 0, *BufferSizes()).encode()

    def _read_line(self) -> int:
        """Read the line, and nothing that follows it, which is for the guest; return its port.

        Raises OSError, BlockingIOError if the line is not complete.
        """
        line, sock, in_flight = self._line, self.sock, self.in_flight
        if in_flight is None:
            while line.port is None:
                sock.recv(line.take(sock.recv(HYBRID_LINE_MAX_BYTES, _PEEK)), _READ)
            return line.port
        if not in_flight.is_done(Step.READ):
            in_flight.read(sock, line.take(sock.recv(HYBRID_LINE_MAX_BYTES, _PEEK)))
        elif not self._has_read:  # a vsockd that was killed has read
            line.take(in_flight.read(sock)[0])
        self._has_read = True
        if line.port is None:
            raise BlockingIOError
        return line.port

    def may_retry(self) -> bool:
        """Return False: the handshake has one CONNECT line."""
        return False

    def send(self, record: bytes, in_flight: InFlight | None = None) -> None:
        """Send the OK line for an accepted connection; a refused one is closed without a reply."""
        answer = Record.decode(record)
        if not answer.status:
            super().send(ok_line(answer.local_port), in_flight)


class HybridListener:
    """The unix socket at ``path`` for a guest's ports, used by programs of the guest's owner.

    Where another user can change the folder, as the owner usually can, the socket is created and
    removed with the owner's rights only.
    """

    def __init__(
        self,
        loop: EventLoop,
        broker: Broker,
        context: Context,
        path: Path,
        relay: Sequence[str],
        taken: tuple[Reader, Saved] | None = None,
    ) -> None:
        """Create the socket and accept connections; ``relay`` is the relay process's command.

        ``taken`` is the listener that the previous vsockd has saved.

        Raises OSError when it cannot be created.
        """
        self._loop = loop
        self._broker = broker
        self._context = context
        self._host = broker.fabric.contexts.host
        self._relay_command = relay
        self._relay: Relay | None = None
        if taken is not None:
            self._restore(*taken, path)
            return
        try:
            self._file = SocketFile(path)
        except OSError as error:
            at = f": {error.filename}" if error.filename else ""
            raise OSError(error.errno, f"hybrid: {path}{at}: {error.strerror}") from None
        self._as_owner = can_others_change(self._file.folder)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        refuse_descriptors(listener)
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
        self._accept(listener)

    def _accept(self, listener: socket.socket) -> None:
        who = f"a program at {self._file.where}"
        self._acceptor = acceptor = Acceptor(self._loop, listener, who, self._admit)
        if (in_flight := self._broker.in_flight) is not None:
            acceptor.accept = in_flight.accepting(self._context.cid, HYBRID, acceptor.accept)
        self._context.fallback = self._find

    def save(self, writer: Writer) -> Saved:
        """Return the listener's state for the next vsockd."""
        relay = self._relay if self._relay is not None and self._relay.is_open else None
        return {
            "folder": writer.descriptor(self._file.folder),
            "made": self._file.made,
            "as_owner": self._as_owner,
            "listener": writer.descriptor(self._acceptor.listener.fileno()),
            "relay": writer.link(relay),
        }

    def _restore(self, reader: Reader, saved: Saved, path: Path) -> None:
        self._file = SocketFile(path, reader.descriptors[saved["folder"]], saved["made"])
        self._as_owner = saved["as_owner"]
        if saved["relay"] is not None:
            relay = reader.links[saved["relay"]]
            assert isinstance(relay, Relay)
            self._relay = relay
        listener = socket.socket(fileno=reader.descriptors[saved["listener"]])
        listener.setblocking(False)
        self._accept(listener)

    def owns(self, fd: int) -> bool:
        """Return whether ``fd`` is a connection to this socket."""
        return self._acceptor.owns(fd)

    def close(self) -> None:
        """Stop accepting connections and remove the socket."""
        self._context.fallback = None
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
        credentials = peer_credentials(sock)
        self._broker.serve_first(HybridChannel(sock, self._host, self._context.cid, credentials))

    # Ports of the host without a listener of the fabric

    def _find(self, kind: EndpointKind, port: int) -> Endpoint | None:
        """Return an endpoint for the unix socket of the host's ``port``, if it exists."""
        if kind is not EndpointKind.STREAM:
            return None
        try:
            name = port_name(self._file.name, port)
            found = os.stat(name, dir_fd=self._file.folder, follow_symlinks=False)
        except OSError:
            return None
        # In a world-writable folder it may be another user's, and a link may lead anywhere.
        if not stat.S_ISSOCK(found.st_mode) or found.st_uid not in (self._context.owner, 0):
            return None
        if self._relay is None or not self._relay.is_open:
            arguments = self._relay_command, self._file, self._context.owner
            self._relay = Relay.start(self._loop, self._broker, *arguments)
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
            pending=True,
        )


class PlayedHostLink(HandoffLink):
    """A link to a played hypervisor, which decides a guest's connects to ports of the host.

    It receives the connects to the ports on which no program of the fabric listens.
    """

    def __init__(
        self,
        loop: EventLoop,
        broker: Broker,
        guest: Context,
        link: _socket.socket,
        credentials: Credentials,
    ) -> None:
        """Attach the link to ``guest``; ``credentials`` are those of the hypervisor's process.

        Raises Refused with EINVAL (``guest`` is not a guest) or EBUSY (another process decides
        these connects).
        """
        if not guest.is_guest:
            raise Refused(errno.EINVAL, f"context {guest.cid} is not a guest")
        if guest.fallback is not None:
            raise Refused(errno.EBUSY, f"context {guest.cid} has hybrid vsock or is played")
        super().__init__(loop, broker, broker.fabric.contexts.host, link)
        self._guest = guest
        self._credentials = credentials
        self._domains = broker.fabric.settings.host_domains
        guest.fallback = self.find
        self._record()

    def save(self, writer: Writer) -> Saved:
        """Return the link's state for the next vsockd."""
        return {
            **super().save(writer),
            "played": self._guest.cid,
            "credentials": (*self._credentials,),
        }

    def close(self) -> None:
        """Close the link; the guest's connects are refused from now on."""
        if self._guest.fallback == self.find:
            self._guest.fallback = None
        super().close()

    def find(self, kind: EndpointKind, port: int) -> Endpoint | None:
        """Return an endpoint for the host's ``port``, which the hypervisor accepts or refuses."""
        if kind is not EndpointKind.STREAM:
            return None
        host, user = self._context, self._credentials.uid
        trust = Trust(user, False, self._domains)
        return Endpoint(
            *(kind, host, host.cid, port, self._credentials),
            trust=trust,
            handle=self,
            listening=True,
            pending=True,
        )


class Relay(HandoffLink):
    """The relay process, which connects to unix sockets that stand for ports of the host."""

    def __init__(self, loop: EventLoop, broker: Broker, link: _socket.socket, pid: int) -> None:
        super().__init__(loop, broker, broker.fabric.contexts.host, link)
        self.pid = pid

    def save(self, writer: Writer) -> Saved:
        """Return the link's state for the next vsockd."""
        return {**super().save(writer), "pid": self.pid}

    @classmethod
    def start(
        cls, loop: EventLoop, broker: Broker, command: Sequence[str], file: SocketFile, user: int
    ) -> Relay:
        """Start a relay for the unix sockets beside ``file``.

        Raises OSError when the process cannot be started.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [*command, file.name, str(file.folder), str(user)]
        try:
            with theirs:
                # In a process group of its own: see :func:`.succession.wait_for_successors`.
                process = subprocess.Popen(
                    command, stdin=theirs.fileno(), pass_fds=[file.folder], process_group=0
                )
        except OSError:
            ours.close()
            raise
        relay = cls(loop, broker, ours, process.pid)
        relay._record()
        return relay


@contextlib.contextmanager
def acting_as(user: int) -> Iterator[None]:
    """Give this thread only the file access rights of ``user`` during the with block.

    The thread has none of the user's groups.

    Raises PermissionError if vsockd may not act as another user.
    """
    own = os.geteuid()
    if user == own:
        yield
        return
    groups = os.getgroups()
    if own or not _act(user, _NOBODY, []):
        raise PermissionError(errno.EPERM, f"vsockd may not use files as user {user}")
    try:
        yield
    finally:
        _act(own, os.getegid(), groups)


def _act(user: int, group: int, groups: list[int]) -> bool:
    if user:  # groups first: setting them needs the privilege
        _set_groups(groups)
        libc.setfsgid(ctypes.c_uint32(group))
    libc.setfsuid(ctypes.c_uint32(user))
    if not user:
        libc.setfsgid(ctypes.c_uint32(group))
        _set_groups(groups)
    return ctypes.c_uint32(libc.setfsuid(_UNCHANGED)).value == user


def _set_groups(groups: list[int]) -> None:
    call = _SETGROUPS.get(platform.machine())
    if call is None:
        os.setgroups(groups)
    elif libc.syscall(call, len(groups), struct.pack(f"{len(groups)}I", *groups)):
        raise last_error()
