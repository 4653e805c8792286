"""Sockets of the kernel's AF_VSOCK.

The kernel does all there is to do; what is here makes the interface the fabric's: options of
other families are ignored (guide page 8), and vSockets options take plain integers.
"""

from __future__ import annotations

import _socket
import errno
import socket as stdlib
from socket import SOCK_DGRAM, SOCK_SEQPACKET, SOCK_STREAM, SOL_SOCKET
from typing import Any, Self

from ...constants import (
    AF_VSOCK,
    SO_VM_SOCKETS_BUFFER_MAX_SIZE,
    SO_VM_SOCKETS_BUFFER_MIN_SIZE,
    SO_VM_SOCKETS_BUFFER_SIZE,
)
from ...socket import BEHAVIOURS, TIMEOUTS, PeerCredentials, as_u64, error, socket

_raw = _socket.socket
_BUFFERS = (
    SO_VM_SOCKETS_BUFFER_SIZE,
    SO_VM_SOCKETS_BUFFER_MIN_SIZE,
    SO_VM_SOCKETS_BUFFER_MAX_SIZE,
)


class KernelSocket(socket):
    """A socket whose Berkeley calls are the kernel's."""

    _raw_family = AF_VSOCK

    bind = _raw.bind
    connect = _raw.connect
    connect_ex = _raw.connect_ex
    listen = _raw.listen  # type: ignore[assignment]
    getsockname = _raw.getsockname
    getpeername = _raw.getpeername

    def __repr__(self) -> str:
        return stdlib.socket.__repr__(self)

    def accept(self) -> tuple[socket, tuple[int, int]]:
        """Wait for a connection: ``(socket, (cid, port) of the peer)``."""
        fd, peer = self._accept()  # type: ignore[attr-defined]  # typeshed leaves it out
        accepted = self.__class__(AF_VSOCK, self.type, 0, fd, context=self._attachment)
        if stdlib.getdefaulttimeout() is None and self.gettimeout():
            accepted.setblocking(True)
        return accepted, peer

    def dup(self) -> Self:
        """A second socket object, on a duplicate of the descriptor."""
        fd = stdlib.dup(self.fileno())
        twin = self.__class__(AF_VSOCK, self.type, 0, fd, context=self._attachment)
        twin.settimeout(self.gettimeout())
        return twin

    def peer_credentials(self) -> PeerCredentials:
        """OSError EOPNOTSUPP: the kernel's AF_VSOCK does not tell."""
        raise error(errno.EOPNOTSUPP, "the kernel's AF_VSOCK knows no peer credentials")

    def getsockopt(self, level: int, optname: int, buflen: int = 0) -> Any:
        """As ``socket.getsockopt``; an ignored option reads as what it was set to, else 0."""
        if level != SOL_SOCKET:
            return super().getsockopt(level, optname, buflen)
        return _raw.getsockopt(self, level, optname, *filter(None, (buflen,)))

    def _set_vsock_option(self, optname: int, value: Any) -> None:
        if optname not in TIMEOUTS:
            value = as_u64(value).to_bytes(8, "little")
        _raw.setsockopt(self, AF_VSOCK, optname, value)

    def _get_vsock_option(self, optname: int, buflen: int) -> Any:
        if buflen or optname in TIMEOUTS:
            return _raw.getsockopt(self, AF_VSOCK, optname, buflen or 16)
        size = 8 if optname in _BUFFERS else 4
        return int.from_bytes(_raw.getsockopt(self, AF_VSOCK, optname, size), "little")

    def _recover(self) -> None:
        if _raw.getsockopt(self, SOL_SOCKET, stdlib.SO_DOMAIN) != AF_VSOCK:
            raise error(errno.EAFNOSUPPORT, "the descriptor is not of the kernel's AF_VSOCK")


for _type in (SOCK_STREAM, SOCK_SEQPACKET, SOCK_DGRAM):
    BEHAVIOURS["kernel"][_type] = KernelSocket
