"""Sockets of the kernel's AF_VSOCK, in a virtual machine or on a host with its modules.

The kernel implements them.  This module only adapts the interface to that of the fabric's sockets:
options of other address families are ignored (guide page 8), and vSockets options are plain
integers.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import socket as stdlib
from collections.abc import Iterator
from socket import SOCK_DGRAM, SOCK_SEQPACKET, SOCK_STREAM, SOL_SOCKET
from typing import Any, Self

from ..attachment import explain
from ..model.address import check
from ..model.constants import (
    AF_VSOCK,
    SO_VM_SOCKETS_BUFFER_MAX_SIZE,
    SO_VM_SOCKETS_BUFFER_MIN_SIZE,
    SO_VM_SOCKETS_BUFFER_SIZE,
)
from ..socket import SOCKET_CLASSES, TIMEOUTS, PeerCredentials, as_u64, error, socket

_raw = _socket.socket
_BUFFERS = (
    SO_VM_SOCKETS_BUFFER_SIZE,
    SO_VM_SOCKETS_BUFFER_MIN_SIZE,
    SO_VM_SOCKETS_BUFFER_MAX_SIZE,
)


class KernelSocket(socket):
    """A socket of the kernel's AF_VSOCK."""

    _raw_family = AF_VSOCK

    getsockname = _raw.getsockname
    getpeername = _raw.getpeername

    def __repr__(self) -> str:
        return stdlib.socket.__repr__(self)

    def bind(self, address: Any, /) -> None:
        """Bind to ``(cid, port)``; VMADDR_CID_ANY and VMADDR_PORT_ANY are wildcards."""
        _raw.bind(self, check(address))

    def connect(self, address: Any, /) -> None:
        """Connect to ``(cid, port)``."""
        try:
            _raw.connect(self, check(address))
        except OSError as failure:
            explain(failure, self._context)
            raise

    def connect_ex(self, address: Any, /) -> int:
        """Connect to ``(cid, port)``; return the errno instead of raising it, or 0."""
        return _raw.connect_ex(self, check(address))

    def listen(self, backlog: int | None = None, /) -> None:
        """Listen, with at most ``backlog`` connections not yet accepted (default 128)."""
        _raw.listen(self, *(() if backlog is None else (backlog,)))

    def accept(self) -> tuple[socket, tuple[int, int]]:
        """Wait for a connection; return its socket and the peer's ``(cid, port)``."""
        fd, peer = self._accept()  # type: ignore[attr-defined]  # typeshed leaves it out
        accepted = self.__class__(AF_VSOCK, self.type, 0, fd, context=self._attachment)
        if stdlib.getdefaulttimeout() is None and self.gettimeout():
            accepted.setblocking(True)
        return accepted, peer

    def dup(self) -> Self:
        """Return another socket object for the same endpoint, with a duplicated descriptor."""
        fd = stdlib.dup(self.fileno())
        twin = self.__class__(AF_VSOCK, self.type, 0, fd, context=self._attachment)
        twin.settimeout(self.gettimeout())
        return twin

    def peer_credentials(self) -> PeerCredentials:
        """Raise OSError(EOPNOTSUPP): the kernel's AF_VSOCK does not report the peer's process."""
        raise error(errno.EOPNOTSUPP, "the kernel's AF_VSOCK does not report peer credentials")

    def setsockopt(self, level: int, optname: int, value: Any, optlen: int | None = None) -> None:
        """Set an option, as ``socket.setsockopt`` does; ignore those of other address families."""
        if level != SOL_SOCKET:
            super().setsockopt(level, optname, value, optlen)
            return
        with self._options() as options:
            if optlen is None:
                options.setsockopt(level, optname, value)
            else:
                options.setsockopt(level, optname, value, optlen)

    def getsockopt(self, level: int, optname: int, buflen: int = 0) -> Any:
        """Return an option, as ``socket.getsockopt`` does.

        An ignored option has the value that it was set to, by default 0.
        """
        if level != SOL_SOCKET:
            return super().getsockopt(level, optname, buflen)
        with self._options() as options:
            return options.getsockopt(level, optname, *filter(None, (buflen,)))

    def _set_vsock_option(self, optname: int, value: Any) -> None:
        if optname not in TIMEOUTS:
            value = as_u64(value).to_bytes(8, "little")
        with self._options() as options:
            options.setsockopt(AF_VSOCK, optname, value)

    def _get_vsock_option(self, optname: int, buflen: int) -> Any:
        size = buflen or (16 if optname in TIMEOUTS else 8 if optname in _BUFFERS else 4)
        with self._options() as options:
            value = options.getsockopt(AF_VSOCK, optname, size)
        if buflen or optname in TIMEOUTS:
            return value
        return int.from_bytes(value, "little")

    @contextlib.contextmanager
    def _options(self) -> Iterator[_socket.socket]:
        """Yield a socket object for this descriptor with a ``family`` other than AF_VSOCK.

        For AF_VSOCK, CPython supports only options that are 64-bit integers; the connect timeout is
        a ``struct timeval``.
        """
        same = _raw(stdlib.AF_UNIX, SOCK_STREAM, 0, self.fileno())
        try:
            yield same
        finally:
            same.detach()

    def _recover(self) -> None:
        if self.getsockopt(SOL_SOCKET, stdlib.SO_DOMAIN) != AF_VSOCK:
            raise error(errno.EAFNOSUPPORT, "the descriptor is not of the kernel's AF_VSOCK")


for _type in (SOCK_STREAM, SOCK_SEQPACKET, SOCK_DGRAM):
    SOCKET_CLASSES["kernel"][_type] = KernelSocket
