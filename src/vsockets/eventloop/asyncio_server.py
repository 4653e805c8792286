"""Listening sockets and bound datagram sockets of locators, served in an asyncio loop."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket as stdlib
from collections.abc import Callable
from pathlib import Path

from .._linux.descriptor_passing import close_in_thread, guard, guard_accepted
from .._linux.folders import SocketFile
from .._linux.sockets import refuse_descriptors
from ..attachment import ContextHandle
from ..limits import ACCEPTS_PER_TURN_MAX, LISTEN_BACKLOG_MAX
from ..model.locator import Inet, Inherited, Locator, Unix, Vsock, VsockFolder, VsockMux
from ..protocol.hybrid import port_name
from ..socket import socket
from . import replacement
from .rebind import REBIND_FIRST_PAUSE_SECONDS, Rebinder
from .retry import Backoff

#: The first descriptor that systemd passes (sd_listen_fds(3)).
_FIRST_INHERITED = 3

_FIRST_UNPRIVILEGED = 1024

#: Pause in seconds after an accept() that failed, for want of descriptors for example.
_ACCEPT_PAUSE_SECONDS = 0.1


class Listener:
    """The open sockets of one locator; ``sockets`` are non-blocking."""

    def __init__(self, locator: Locator, context: ContextHandle | None = None) -> None:
        """Open the sockets, in ``context`` if ``locator`` is a vSockets address.

        If this process replaces another one, that process's open sockets are used instead.

        Raises OSError if a socket cannot be bound.
        """
        self.sockets: list[stdlib.socket] = []
        self._file: SocketFile | None = None
        self._locator = locator
        try:
            handed_over = replacement.inherited(str(locator))
            if handed_over is not None:
                self._adopt(handed_over, context)
            else:
                self._open(locator, context)
        except BaseException:
            self.close()
            raise
        for sock in self.sockets:
            sock.setblocking(False)
        _open_listeners[self] = None

    def close(self) -> None:
        """Close the sockets and remove the file of a unix socket."""
        _open_listeners.pop(self, None)
        if self._file is not None:
            self._file.remove()
            self._file.close()
            self._file = None
        for sock in self.sockets:
            close_in_thread(sock)
        self.sockets.clear()

    def hand_over(self) -> replacement.HandedOver:
        """Return the sockets for another process."""
        file = None
        if self._file is not None:
            file = [os.fspath(self._file.where), self._file.made]
        fds = [sock.fileno() for sock in self.sockets]
        return replacement.HandedOver(str(self._locator), file, fds)

    def disown(self) -> None:
        """Leave the file of a unix socket to the process that the sockets were handed over to."""
        if self._file is not None:
            self._file.made = None

    def _adopt(self, handed_over: replacement.HandedOver, context: ContextHandle | None) -> None:
        if handed_over.file is not None:
            path, made = handed_over.file
            self._file = SocketFile(Path(path), made=made)
        for fd in handed_over.fds:
            if isinstance(self._locator, Vsock):
                sock: stdlib.socket = socket(
                    type=_type(self._locator.datagram), fileno=fd, context=context
                )
            else:
                sock = stdlib.socket(fileno=fd)
            self.sockets.append(sock)
            if sock.type == stdlib.SOCK_DGRAM:
                guard(sock)

    @property
    def where(self) -> str:
        """The first socket's address without the locator's scheme, with wildcards resolved."""
        if self._file is not None:
            return os.fspath(self._file.where)
        name = self.sockets[0].getsockname()
        if isinstance(name, tuple):
            host = f"[{name[0]}]" if ":" in str(name[0]) else name[0]
            return f"{host}:{name[1]}"
        return os.fsdecode(name)

    def _open(self, locator: Locator, context: ContextHandle | None) -> None:
        match locator:
            case Vsock(cid, port, datagram):
                sock = socket(type=_type(datagram), context=context)
                self.sockets.append(sock)
                if datagram:  # vsockd passes a listener the descriptors of its streams
                    guard(sock)
                sock.bind((cid, port))
                if not datagram:
                    sock.listen(LISTEN_BACKLOG_MAX)
            case Inet(host, port, datagram):
                self._open_inet(host, port, datagram)
            case Unix(path, datagram):
                self._open_unix(path, datagram)
            case VsockMux(path, port):
                # Guest to host in hybrid vsock: the device connects here for the guest.
                self._open_unix(port_name(path, port), False)
            case VsockFolder():
                self._open_unix(locator.socket_path, False)
            case Inherited(name):
                self.sockets.append(_inherited(name))
            case _:
                raise OSError(errno.EOPNOTSUPP, f"{locator}: unsupported as a listening address")

    def _open_inet(self, host: str, port: int, datagram: bool) -> None:
        found = stdlib.getaddrinfo(
            host or None, port, type=_type(datagram), flags=stdlib.AI_PASSIVE
        )
        if not host:  # one socket for both families, if the machine has both
            found.sort(key=lambda entry: entry[0] != stdlib.AF_INET6)
        for family, _, _, _, address in found:
            try:
                sock = stdlib.socket(family, _type(datagram))
            except OSError:
                continue  # this kernel has no IPv6
            self.sockets.append(sock)
            sock.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_REUSEADDR, int(not datagram))
            if family == stdlib.AF_INET6:
                sock.setsockopt(stdlib.IPPROTO_IPV6, stdlib.IPV6_V6ONLY, int(bool(host)))
            if port == 0 and len(self.sockets) > 1:
                address = (address[0], self.sockets[0].getsockname()[1], *address[2:])
            sock.bind(address)
            if not datagram:
                sock.setsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY, 1)  # inherited by accept
                sock.listen(LISTEN_BACKLOG_MAX)
            if not host:
                return
        if not self.sockets:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))

    def _open_unix(self, path: str, datagram: bool) -> None:
        sock = guard(stdlib.socket(stdlib.AF_UNIX, _type(datagram)))
        self.sockets.append(sock)
        if path.startswith("@"):
            sock.bind("\0" + path[1:])
        else:
            # SocketFile: users who can change what the path leads to cannot redirect the removal.
            self._file = SocketFile(Path(path))
            self._file.bind(sock)
        if not datagram:
            sock.listen(LISTEN_BACKLOG_MAX)


#: The open listeners of this process, in the order in which they were opened.
_open_listeners: dict[Listener, None] = {}


def _hand_over() -> list[replacement.HandedOver]:
    return [listener.hand_over() for listener in _open_listeners if listener.sockets]


def _disown() -> None:
    for listener in _open_listeners:
        listener.disown()


replacement.register(_hand_over, _disown)


def open_listener(locator: Locator, context: ContextHandle | None) -> Listener:
    """Return the open sockets of ``locator``.

    Raises OSError, whose text names the locator.
    """
    try:
        return Listener(locator, context)
    except OSError as error:
        why = error.strerror or str(error)
        reserved = isinstance(locator, Vsock | Inet) and locator.port < _FIRST_UNPRIVILEGED
        if error.errno == errno.EACCES and reserved:
            why = f"{why} (ports below 1024 need CAP_NET_BIND_SERVICE)"
        raise OSError(error.errno, f"cannot listen on {locator}: {why}") from None


def _type(datagram: bool) -> int:
    return stdlib.SOCK_DGRAM if datagram else stdlib.SOCK_STREAM


def _inherited(name: str) -> stdlib.socket:
    """Return the inherited socket with the descriptor or LISTEN_FDNAMES entry ``name``."""
    if not name.isdecimal():
        names = os.environ.get("LISTEN_FDNAMES", "").split(":")
        if os.environ.get("LISTEN_PID") != str(os.getpid()) or name not in names:
            raise OSError(errno.EBADF, f"no descriptor named {name} was passed (LISTEN_FDNAMES)")
        name = str(_FIRST_INHERITED + names.index(name))
    sock = stdlib.socket(fileno=os.dup(int(name)))
    refuse_descriptors(sock)
    if sock.type == stdlib.SOCK_STREAM and not sock.getsockopt(
        stdlib.SOL_SOCKET, stdlib.SO_ACCEPTCONN
    ):
        sock.close()
        raise OSError(errno.EINVAL, f"descriptor {name}: not a listening socket")
    return sock


class AsyncioAcceptor:
    """The accept loop of a listener.

    ``admit`` gets each accepted socket while ``has_room`` returns True; otherwise clients wait in
    the backlog.  ``reopen`` returns a new listener when vsockd, on which a vSockets listener
    depends, has ended and another vsockd serves.
    """

    def __init__(
        self,
        where: Locator,
        listener: Listener,
        admit: Callable[[stdlib.socket], None],
        *,
        has_room: Callable[[], bool],
        reopen: Callable[[], Listener],
        log: logging.Logger,
    ) -> None:
        self.listener: Listener | None = listener  #: None once closed
        self._where = where
        self._admit = admit
        self._has_room = has_room
        self._reopen = reopen
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._accepting = False
        self._backoff = Backoff(REBIND_FIRST_PAUSE_SECONDS)
        self._set_accepting(True)

    def close(self) -> None:
        """Close the listener; accepted sockets stay open."""
        self._set_accepting(False)
        if self.listener is not None:
            self.listener.close()
            self.listener = None

    def recheck_room(self) -> None:
        """Accept again if there is room.  The caller calls it when a client's session has ended."""
        if self._has_room():
            self._set_accepting(True)

    def _set_accepting(self, wanted: bool) -> None:
        if self.listener is None or wanted == self._accepting:
            return
        self._accepting = wanted
        for sock in self.listener.sockets:
            if wanted:
                self._loop.add_reader(sock.fileno(), self._accept, sock)
            else:
                self._loop.remove_reader(sock.fileno())

    def _accept(self, listening: stdlib.socket) -> None:
        for _ in range(ACCEPTS_PER_TURN_MAX):
            if self.listener is None:
                return  # admit() has closed the listener
            if not self._has_room():
                self._set_accepting(False)  # the backlog makes clients wait
                return
            try:
                client, _ = listening.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.ECONNABORTED, errno.ECONNRESET):
                    continue  # the client has closed the connection already
                self._log.warning("%s: cannot accept: %s", self._where, error.strerror)
                self._set_accepting(False)
                if error.errno == errno.ENETDOWN:
                    self._backoff.reset()
                    self._loop.call_later(self._backoff.next_pause(), self._open_again)
                else:
                    self._loop.call_later(_ACCEPT_PAUSE_SECONDS, self._set_accepting, True)
                return
            client.setblocking(False)
            self._admit(guard_accepted(client))

    def _open_again(self) -> None:
        """Replace the listener, once another vsockd serves."""
        if self.listener is None:
            return
        self.listener.close()
        try:
            self.listener = self._reopen()
        except OSError:
            self._loop.call_later(self._backoff.next_pause(), self._open_again)
        else:
            self._log.warning("%s: listening again", self._where)
            self._accepting = False
            self._set_accepting(True)


class DatagramReceiver:
    """The readable sockets of a datagram listener, each passed to ``receive``.

    If the listener or ``target`` is a vSockets address, vsockd's end closes the sockets.  Then
    ``lost`` is called, and once another vsockd serves, ``reopen`` returns a new listener.
    """

    def __init__(
        self,
        where: Locator,
        listener: Listener,
        receive: Callable[[stdlib.socket], None],
        *,
        reopen: Callable[[], Listener],
        context: ContextHandle | None,
        log: logging.Logger,
        target: Locator | None = None,
        lost: Callable[[], None] = lambda: None,
    ) -> None:
        """Start to receive from ``listener``; ``where`` is its locator.

        Raises OSError when vsockd cannot be reached.
        """
        self.listener = listener
        self._where = where
        self._receive = receive
        self._reopen = reopen
        self._lost = lost
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._rebinder: Rebinder | None = None
        if isinstance(where, Vsock) or isinstance(target, Vsock):
            self._rebinder = Rebinder(context, self._on_vsockd_ended, self._open_again)
        self._listen()

    def stop(self) -> None:
        """Receive nothing more; replies may be sent until :meth:`close`."""
        if self._rebinder is not None:
            self._rebinder.close()
        for sock in self.listener.sockets:
            self._loop.remove_reader(sock.fileno())

    def close(self) -> None:
        """Close the listener."""
        self.stop()
        self._close_listener()

    def _listen(self) -> None:
        for sock in self.listener.sockets:
            self._loop.add_reader(sock.fileno(), self._receive, sock)

    def _close_listener(self) -> None:
        for sock in self.listener.sockets:
            self._loop.remove_reader(sock.fileno())
        self.listener.close()

    def _on_vsockd_ended(self) -> None:
        self._log.warning("%s: vsockd has ended", self._where)
        self._lost()
        if isinstance(self._where, Vsock):
            self._close_listener()

    def _open_again(self) -> None:
        if isinstance(self._where, Vsock):
            self.listener = self._reopen()
            self._listen()
        self._log.warning("%s: listening again", self._where)
