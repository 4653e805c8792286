"""Where a bridge lets clients in: listening sockets, and bound datagram sockets."""

from __future__ import annotations

import errno
import os
import socket as stdlib
from pathlib import Path

from .._linux.descriptor_passing import close_elsewhere, guard
from .._linux.folders import SocketFile
from ..attachment import ContextHandle
from ..limits import LISTEN_BACKLOG_MAX
from ..model.locator import Inet, Inherited, Locator, Unix, Vsock, VsockFolder, VsockMux
from ..pass_rights import refuse
from ..protocol.hybrid import port_name
from ..socket import socket

#: Where systemd puts the sockets it passes (sd_listen_fds(3)).
_FIRST_INHERITED = 3

_FIRST_UNPRIVILEGED = 1024


class Listener:
    """Open sockets for one locator; ``sockets`` are non-blocking."""

    def __init__(self, locator: Locator, context: ContextHandle | None = None) -> None:
        """Raises OSError."""
        self.sockets: list[stdlib.socket] = []
        self._file: SocketFile | None = None
        try:
            self._open(locator, context)
        except BaseException:
            self.close()
            raise
        for sock in self.sockets:
            sock.setblocking(False)

    def close(self) -> None:
        """Let nobody in any more."""
        if self._file is not None:
            self._file.remove()
            self._file.close()
            self._file = None
        for sock in self.sockets:
            close_elsewhere(sock)
        self.sockets.clear()

    @property
    def where(self) -> str:
        """The first socket's address, with wildcards filled in, as a locator without scheme."""
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
                # The other direction of hybrid vsock: the device connects here for the guest.
                self._open_unix(port_name(path, port), False)
            case VsockFolder():
                self._open_unix(locator.socket_path, False)
            case Inherited(name):
                self.sockets.append(_inherited(name))
            case _:
                raise OSError(errno.EOPNOTSUPP, f"{locator} is nowhere to listen")

    def _open_inet(self, host: str, port: int, datagram: bool) -> None:
        found = stdlib.getaddrinfo(
            host or None, port, type=_type(datagram), flags=stdlib.AI_PASSIVE
        )
        if not host:  # one socket for both families, where there are both
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
            # Where others can change what the path leads to, they do not change what is removed.
            self._file = SocketFile(Path(path))
            self._file.bind(sock)
        if not datagram:
            sock.listen(LISTEN_BACKLOG_MAX)


def open_listener(locator: Locator, context: ContextHandle | None) -> Listener:
    """A door, or an OSError that says where it was to be."""
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
    """The descriptor with that number, or that name in LISTEN_FDNAMES."""
    if not name.isdecimal():
        names = os.environ.get("LISTEN_FDNAMES", "").split(":")
        if os.environ.get("LISTEN_PID") != str(os.getpid()) or name not in names:
            raise OSError(errno.EBADF, f"no descriptor named {name} was passed (LISTEN_FDNAMES)")
        name = str(_FIRST_INHERITED + names.index(name))
    sock = stdlib.socket(fileno=os.dup(int(name)))
    refuse(sock)
    if sock.type == stdlib.SOCK_STREAM and not sock.getsockopt(
        stdlib.SOL_SOCKET, stdlib.SO_ACCEPTCONN
    ):
        sock.close()
        raise OSError(errno.EINVAL, f"descriptor {name} is no listening socket")
    return sock
