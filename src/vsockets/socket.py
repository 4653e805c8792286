"""The Berkeley socket of vSockets: a drop-in for ``socket.socket`` with AF_VSOCK.

This module has what all transports and types share: construction, addresses and options.  Each
transport adds a *socket class* per type, for connections and data.  A socket changes its class when
it is created, and again when a stream is established: an established stream's ``send`` and ``recv``
are the standard library's C methods, at no extra cost.
"""

from __future__ import annotations

import enum
import errno
import os
import socket as stdlib
import struct
from socket import SO_DOMAIN, SO_ERROR, SO_PEERCRED, SOCK_CLOEXEC, SOCK_NONBLOCK, SOL_SOCKET
from typing import Any, NamedTuple, Self

from ._linux.sockets import TIMEVAL, cookie_of
from .attachment import ContextHandle, current
from .limits import CONNECT_TIMEOUT_MAX_SECONDS, CONNECT_TIMEOUT_SECONDS
from .model.address import FIRST_GUEST_CID
from .model.buffers import DEFAULT_SIZES, BufferSizes
from .model.constants import (
    AF_VSOCK,
    SO_VM_SOCKETS_BUFFER_MAX_SIZE,
    SO_VM_SOCKETS_BUFFER_MIN_SIZE,
    SO_VM_SOCKETS_BUFFER_SIZE,
    SO_VM_SOCKETS_CONNECT_TIMEOUT_NEW,
    SO_VM_SOCKETS_CONNECT_TIMEOUT_OLD,
    SO_VM_SOCKETS_PEER_HOST_VM_ID,
    SO_VM_SOCKETS_TRUSTED,
    VMADDR_CID_ANY,
    VMADDR_CID_HOST,
    VMADDR_PORT_ANY,
)
from .protocol import Record

UNBOUND = (VMADDR_CID_ANY, VMADDR_PORT_ANY)

MSG_ERRQUEUE = 0x2000  #: linux/socket.h; the standard library lacks it
_U64 = struct.Struct("=Q")
_UCRED = struct.Struct("iII")
#: Options whose value is a ``struct timeval``.
TIMEOUTS = (SO_VM_SOCKETS_CONNECT_TIMEOUT_OLD, SO_VM_SOCKETS_CONNECT_TIMEOUT_NEW)


class Phase(enum.Enum):
    """The state of a socket."""

    NEW = enum.auto()
    BOUND = enum.auto()
    LISTENING = enum.auto()
    CONNECTING = enum.auto()
    CONNECTED = enum.auto()
    #: A connect of a non-blocking socket has failed.  As on Linux, it cannot be connected again.
    FAILED = enum.auto()
    #: Of a supervised program's socket alone: vsockd has ended, or has released the socket's port.
    LOST = enum.auto()


class PeerCredentials(NamedTuple):
    """The credentials of the peer's process, as the kernel reported them to vsockd."""

    pid: int
    uid: int
    gid: int


def error(code: int, why: str = "") -> OSError:
    """Return an OSError with the errno ``code`` and its text, followed by ``why`` if given."""
    text = os.strerror(code)
    return OSError(code, f"{text}: {why}" if why else text)


class socket(stdlib.socket):  # noqa: N801 - the name is the standard library's
    """A vSockets endpoint.

    ``family``, ``type``, ``proto`` and ``fileno`` are those of ``socket.socket``; ``type`` is
    SOCK_STREAM, SOCK_SEQPACKET or SOCK_DGRAM.  ``context`` is what :func:`vsockets.attach`
    returned, by default the context the process belongs to.  Addresses are ``(cid, port)``.

    Raises OSError with EAFNOSUPPORT, ESOCKTNOSUPPORT or EPROTONOSUPPORT as Linux does.
    """

    # No __slots__: an attribute with its default value costs an instance nothing.
    _attachment: ContextHandle | None = None
    _raw_family: int = stdlib.AF_UNIX  # the family that the C class is created with
    _buffers = DEFAULT_SIZES
    _connect_timeout = CONNECT_TIMEOUT_SECONDS
    _ignored: dict[tuple[int, int], Any] | None = None
    _is_shut = False  # by shutdown(), in any direction
    _local = UNBOUND
    _peer: tuple[int, int] | None = None
    _phase = Phase.NEW
    _record: Record | None = None  # vsockd's description of the stream
    _unknown_option = errno.ENOPROTOOPT

    def __init__(
        self,
        family: int = AF_VSOCK,
        type: int = stdlib.SOCK_STREAM,
        proto: int = 0,
        fileno: int | None = None,
        *,
        context: ContextHandle | None = None,
    ) -> None:
        if family not in _FAMILIES:
            raise error(errno.EAFNOSUPPORT, f"family {family}: expected AF_VSOCK ({AF_VSOCK})")
        if proto not in _PROTOCOLS:
            raise error(errno.EPROTONOSUPPORT, f"protocol {proto}: expected 0")
        if type == -1:
            type = stdlib.SOCK_STREAM if fileno is None else _type_of(fileno)
        handle = current() if context is None else context
        socket_class = SOCKET_CLASSES[handle.transport].get(type & _TYPE_BITS)
        if socket_class is None:
            raise error(
                errno.ESOCKTNOSUPPORT,
                f"type {type}: expected SOCK_STREAM, SOCK_SEQPACKET or SOCK_DGRAM",
            )
        # Called by name: super() would take longer than all the rest.
        stdlib.socket.__init__(self, socket_class._raw_family, type, 0, fileno)
        if context is not None:
            self._attachment = context
        if self.__class__ is socket:
            self.__class__ = socket_class  # as switch_class() does, in the usual case
        else:
            switch_class(self, socket_class)
        if fileno is not None:
            self._recover()

    def __repr__(self) -> str:
        kind = _KIND_NAMES.get(self.type, self.type)
        peer = f" peer={self._peer}" if self._peer else ""
        return f"<vsockets.socket fd={self.fileno()} {kind} local={self._local}{peer}>"

    # Addresses

    @property
    def family(self) -> int:  # type: ignore[override]  # the standard library has an enum
        """The address family: AF_VSOCK, although the kernel's socket may be of AF_UNIX."""
        return _FAMILY

    def getsockname(self) -> tuple[int, int]:
        """Return the local ``(cid, port)``; both are wildcards while the socket is not bound."""
        return self._local

    def getpeername(self) -> tuple[int, int]:
        """Return the peer's ``(cid, port)``.

        Raises OSError(ENOTCONN) before a connect and, as Linux's AF_VSOCK does, after a shutdown.
        """
        if self._peer is None or self._is_shut:
            raise error(errno.ENOTCONN)
        return self._peer

    def peer_credentials(self) -> PeerCredentials:
        """Return the credentials of the process that connected or listened at the other end.

        Raises OSError(ENOTCONN) if the socket has no peer or the peer's process is unknown.
        """
        if self._record is None:
            raise error(errno.ENOTCONN)
        return PeerCredentials(self._record.pid, self._record.uid, self._record.gid)

    # Options

    def setsockopt(self, level: int, optname: int, value: Any, optlen: int | None = None) -> None:
        """Set an option, as ``socket.setsockopt`` does.

        The vSockets options have level AF_VSOCK, and take an integer or eight bytes.  Options of
        other address families are accepted and ignored.
        """
        if level == AF_VSOCK:
            self._set_vsock_option(optname, value)
        elif level != SOL_SOCKET:
            if self._ignored is None:
                self._ignored = {}
            self._ignored[level, optname] = value
        elif optlen is None:
            super().setsockopt(level, optname, value)
        else:
            super().setsockopt(level, optname, value, optlen)

    def getsockopt(self, level: int, optname: int, buflen: int = 0) -> Any:
        """Return an option, as ``socket.getsockopt`` does: bytes if ``buflen`` is given.

        An ignored option has the value that it was set to, by default 0.
        """
        if level == AF_VSOCK:
            return self._get_vsock_option(optname, buflen)
        if level != SOL_SOCKET:
            value = (self._ignored or {}).get((level, optname), 0)
            if not buflen:
                return value
            return _as_asked(value & 0xFFFFFFFF, buflen) if isinstance(value, int) else value
        if optname == SO_DOMAIN:
            return _as_asked(AF_VSOCK, buflen)
        if optname == stdlib.SO_ACCEPTCONN:
            return _as_asked(int(self._phase is Phase.LISTENING), buflen)
        if optname == SO_ERROR:
            return _as_asked(self._pending_error(), buflen)
        if optname == SO_PEERCRED:
            known = self._record
            return _UCRED.pack(*(known[7:10] if known else (0, 0xFFFFFFFF, 0xFFFFFFFF)))
        if buflen:
            return super().getsockopt(level, optname, buflen)
        return super().getsockopt(level, optname)

    def _set_vsock_option(self, optname: int, value: Any) -> None:
        if optname in TIMEOUTS:
            self._connect_timeout = _seconds(value)
        elif optname in _CHANGE_BUFFERS:
            self._buffers = _CHANGE_BUFFERS[optname](self._buffers, as_u64(value))
            self._buffers_changed()
        else:
            raise error(errno.ENOPROTOOPT, f"vSockets option {optname} cannot be set")

    def _get_vsock_option(self, optname: int, buflen: int) -> Any:
        if optname in TIMEOUTS:
            whole = int(self._connect_timeout)
            return TIMEVAL.pack(whole, round((self._connect_timeout - whole) * 1e6))
        if optname == SO_VM_SOCKETS_BUFFER_SIZE:
            number = self._buffers.size
        elif optname == SO_VM_SOCKETS_BUFFER_MIN_SIZE:
            number = self._buffers.minimum
        elif optname == SO_VM_SOCKETS_BUFFER_MAX_SIZE:
            number = self._buffers.maximum
        elif optname == SO_VM_SOCKETS_PEER_HOST_VM_ID:
            number = self._peer_vm()
        elif optname == SO_VM_SOCKETS_TRUSTED:
            number = int(self._is_trusted())
        else:
            raise error(self._unknown_option, f"vSockets option {optname} does not exist")
        return _U64.pack(number)[:buflen] if buflen else number

    def _peer_vm(self) -> int:
        """Return the value of SO_VM_SOCKETS_PEER_HOST_VM_ID: in the fabric, the peer's CID.

        The option is "only available for hypervisor endpoints" (``linux/vm_sockets.h``).
        """
        peer = self.getpeername()[0]
        if self._context.cid >= FIRST_GUEST_CID:
            raise error(errno.ENOPROTOOPT, "only the host can read which machine its peer is")
        return peer

    # Shared by the socket classes

    @property
    def _context(self) -> ContextHandle:
        """The context that this socket belongs to."""
        if self._attachment is None:
            self._attachment = current()
        return self._attachment

    def _is_trusted(self) -> bool:
        peer = self._peer[0] if self._peer is not None else VMADDR_CID_HOST
        return self._context.is_trusted(self.type, peer, cookie_of(self))

    # Provided by each socket class

    def accept(self) -> tuple[socket, tuple[int, int]]:
        """Wait for a connection; return its socket and the peer's ``(cid, port)``."""
        raise NotImplementedError

    def connect_ex(self, address: Any, /) -> int:
        """Call :meth:`connect`; return the errno instead of raising it, or 0."""
        try:
            self.connect(address)
        except OSError as failure:
            if failure.errno is None:
                raise
            return failure.errno
        return 0

    def listen(self, backlog: int | None = None, /) -> None:
        """Listen, with at most ``backlog`` connections not yet accepted (default 128)."""
        raise NotImplementedError

    def _recover(self) -> None:
        """Find out the state of the descriptor, which another socket object has created."""
        raise NotImplementedError

    def _pending_error(self) -> int:
        """Return and clear SO_ERROR: 0, or the errno of a connect that has failed."""
        return 0

    def _buffers_changed(self) -> None:
        """Handle a change of the buffer sizes by the program: report it to vsockd if needed."""

    def dup(self) -> Self:
        """Return another socket object for the same endpoint, with a duplicated descriptor."""
        twin = self.__class__.__new__(self.__class__)
        stdlib.socket.__init__(twin, stdlib.AF_UNIX, self.type, 0, stdlib.dup(self.fileno()))
        vars(twin).update(vars(self))
        twin.settimeout(self.gettimeout())
        return twin


#: The class of a new socket, by transport and type.  Each transport registers its own.
SOCKET_CLASSES: dict[str, dict[int, type[socket]]] = {"fabric": {}, "kernel": {}}

_KIND_NAMES = {
    int(stdlib.SOCK_STREAM): "stream",
    int(stdlib.SOCK_SEQPACKET): "seqpacket",
    int(stdlib.SOCK_DGRAM): "dgram",
}
_FAMILY: int = getattr(stdlib, "AF_VSOCK", AF_VSOCK)
_FAMILIES = (AF_VSOCK, -1)
_PROTOCOLS = (0, -1, AF_VSOCK)
_TYPE_BITS = ~int(SOCK_NONBLOCK | SOCK_CLOEXEC)
_CHANGE_BUFFERS = {
    SO_VM_SOCKETS_BUFFER_SIZE: BufferSizes.with_size,
    SO_VM_SOCKETS_BUFFER_MIN_SIZE: BufferSizes.with_minimum,
    SO_VM_SOCKETS_BUFFER_MAX_SIZE: BufferSizes.with_maximum,
}


def switch_class(sock: socket, socket_class: type[socket]) -> None:
    """Change the class of ``sock`` to ``socket_class``, below the program's own subclass if any."""
    cls = sock.__class__
    variant = _VARIANTS.get((cls, socket_class)) or _make_variant(cls, socket_class)
    # For mypy the class in a plain assignment to __class__ would have to be constant.
    object.__setattr__(sock, "__class__", variant)


def _make_variant(cls: type[socket], socket_class: type[socket]) -> type[socket]:
    variant = socket_class
    if not issubclass(socket_class, cls):
        own = _OWN_CLASS.get(cls, cls)
        variant = type(own.__name__, (own, socket_class), {})
        _OWN_CLASS[variant] = own
    _VARIANTS[cls, socket_class] = variant
    return variant


#: The combined class for each (current class, socket class).
_VARIANTS: dict[tuple[type[socket], type[socket]], type[socket]] = {}
#: The program's own class that a combined class was made from.
_OWN_CLASS: dict[type[socket], type[socket]] = {}


def _type_of(fd: int) -> int:
    found = stdlib.socket(fileno=fd)
    try:
        return found.type
    finally:
        found.detach()


def _as_asked(number: int, buflen: int) -> Any:
    return number.to_bytes(4, "little")[:buflen] if buflen else number


def as_u64(value: Any) -> int:
    """Return the buffer size ``value``, an integer or eight bytes, as a number.

    Raises OSError(EINVAL) if it is negative, too large, or of another size.
    """
    if isinstance(value, int):
        number = value
    else:
        raw = bytes(value)
        if len(raw) != _U64.size:
            raise error(errno.EINVAL, f"expected {_U64.size} bytes, not {len(raw)}")
        number = _U64.unpack(raw)[0]
    if not 0 <= number < 1 << 64:
        raise error(errno.EINVAL, f"buffer size {number}: expected an unsigned 64-bit number")
    return number


def _seconds(value: Any) -> float:
    if isinstance(value, int) or len(bytes(value)) != TIMEVAL.size:
        raise error(errno.EINVAL, "connect timeout: expected a struct timeval of 16 bytes")
    seconds, microseconds = TIMEVAL.unpack(bytes(value))
    if not 0 <= seconds <= CONNECT_TIMEOUT_MAX_SECONDS or microseconds >= 1_000_000:
        raise error(
            errno.ERANGE, f"connect timeout of {seconds} s and {microseconds} us: out of range"
        )
    if microseconds < 0:  # a large unsigned number to Linux
        return float(CONNECT_TIMEOUT_MAX_SECONDS)
    # As on Linux, 0 means the default.
    return float(seconds + microseconds / 1e6) or CONNECT_TIMEOUT_SECONDS
