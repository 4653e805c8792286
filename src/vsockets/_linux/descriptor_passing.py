"""Descriptors passed along with data (SCM_RIGHTS), to receivers that want none.

The kernel closes a passed descriptor that its receiver did not take: at the next ``recv``,
``splice`` or ``close`` of the receiver, in the calling thread.  Closing can wait: for a TCP
socket that lingers, or for a file system in user space.  The sender decides for how long.

From Linux 6.16 on a socket can refuse descriptors (SO_PASSRIGHTS): the sender gets EPERM.  On
older kernels a guarded socket takes what comes, and leaves it to threads that close it.
"""

from __future__ import annotations

import _socket
import array
import contextlib
import os
import queue
import socket as stdlib
import struct
import threading
from collections.abc import Callable
from socket import AF_UNIX, CMSG_SPACE, MSG_CMSG_CLOEXEC, SCM_RIGHTS, SHUT_RDWR, SOL_SOCKET
from typing import TYPE_CHECKING, Any, TypeVar

from ..limits import DESCRIPTOR_CLOSE_THREADS_MAX
from .sockets import SO_PASSRIGHTS, refuse_descriptors

#: Descriptors of one message at most (SCM_MAX_FD).
_MOST = 253
_INT = array.array("i").itemsize
_ROOM = CMSG_SPACE(_MOST * _INT)
_CLOEXEC = int(MSG_CMSG_CLOEXEC)
_NO_LINGER = struct.pack("ii", 0, 0)

Socket = TypeVar("Socket", bound=stdlib.socket)

#: The kernel's family of a socket, which a vSockets socket overrides.
_raw_family = _socket.socket.family.__get__

# Closing


class _Disposal:
    """Threads that close descriptors: one more than are held up, so that one is ready."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[int, Callable[[], None]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = self._ready = 0

    def put(self, fd: int, closed: Callable[[], None]) -> None:
        self._queue.put((fd, closed))
        if not self._threads:
            self._have_one_ready()

    def _have_one_ready(self) -> None:
        with self._lock:
            if self._ready or self._threads >= DESCRIPTOR_CLOSE_THREADS_MAX:
                return
            self._threads += 1
            self._ready += 1
        threading.Thread(target=self._close_all, name="disposal", daemon=True).start()

    def _close_all(self) -> None:
        while True:
            fd, closed = self._queue.get()
            with self._lock:
                self._ready -= 1
            self._have_one_ready()
            with contextlib.suppress(OSError):
                _hasten(fd)
            with contextlib.suppress(OSError):
                os.close(fd)
            closed()
            with self._lock:
                self._ready += 1


def _hasten(fd: int) -> None:
    """Take SO_LINGER back from a socket.  Raises OSError for other files."""
    sock = _socket.socket(fileno=fd)
    try:
        sock.setsockopt(SOL_SOCKET, stdlib.SO_LINGER, _NO_LINGER)
    finally:
        sock.detach()


_disposal = _Disposal()


def dispose(fd: int, closed: Callable[[], None] = lambda: None) -> None:
    """Close ``fd`` soon, in another thread, which calls ``closed`` then."""
    _disposal.put(fd, closed)


def close_elsewhere(sock: stdlib.socket) -> None:
    """Close ``sock``, and what nobody has received from it, without waiting for that."""
    if sock.fileno() >= 0:
        dispose(sock.detach())


# Receiving


def guard(sock: Socket) -> Socket:
    """Make descriptors that are sent to ``sock`` harmless, and return it.

    Call it before a socket is bound or connected.  On older kernels what follows must read with
    ``recv``, ``recv_into`` or ``recvfrom``: see :func:`is_guarded`.
    """
    if _raw_family(sock) == AF_UNIX and not refuse_descriptors(sock):
        _become_guarded(sock)
    return sock


def guard_accepted(sock: Socket) -> Socket:
    """As :func:`guard`, for a socket that may have something in its queue already."""
    if _raw_family(sock) == AF_UNIX and not _refuses(sock):
        refuse_descriptors(sock)
        _become_guarded(sock)
    return sock


def _refuses(sock: _socket.socket) -> bool:
    try:
        return _socket.socket.getsockopt(sock, SOL_SOCKET, SO_PASSRIGHTS) == 0
    except OSError:
        return False


def _become_guarded(sock: stdlib.socket) -> None:
    cls = type(sock)
    if issubclass(cls, _Guarded):
        return
    guarded = _guarded_classes.get(cls)
    if guarded is None:
        guarded = type(cls.__name__, (_Guarded, cls), {"__slots__": ()})
        _guarded_classes[cls] = guarded
    object.__setattr__(sock, "__class__", guarded)


def is_guarded(sock: stdlib.socket) -> bool:
    """Return whether ``sock`` is guarded by its methods, so that ``splice`` would pass by."""
    return isinstance(sock, _Guarded)


if TYPE_CHECKING:
    _Mixin = stdlib.socket
else:
    # Classes of existing sockets get it: another base class would change their layout.
    _Mixin = object


class _Guarded(_Mixin):
    """A socket that receives descriptors in order to have them closed elsewhere."""

    __slots__ = ()

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        return self.recvfrom(bufsize, flags)[0]

    def recvfrom(self, bufsize: int, flags: int = 0, /) -> tuple[bytes, Any]:
        data, ancillary, _, address = super().recvmsg(bufsize, _ROOM, flags | _CLOEXEC)
        if ancillary:
            _dispose_of(ancillary)
        return data, address

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        view = memoryview(buffer).cast("B")
        buffers = [view[:nbytes] if nbytes else view]
        size: int
        size, ancillary, *_ = super().recvmsg_into(buffers, _ROOM, flags | _CLOEXEC)
        if ancillary:
            _dispose_of(ancillary)
        return size

    def close(self) -> None:
        """Close it in another thread: what nobody has received is closed with it."""
        if self.fileno() >= 0 and self.type != stdlib.SOCK_DGRAM:
            with contextlib.suppress(OSError):  # so the peer need not wait for that
                _socket.socket.shutdown(self, SHUT_RDWR)
        close_elsewhere(self)
        super().close()


_guarded_classes: dict[type[stdlib.socket], type[Any]] = {}


def _dispose_of(ancillary: list[tuple[int, int, bytes]]) -> None:
    for level, kind, data in ancillary:
        if level == SOL_SOCKET and kind == SCM_RIGHTS:
            for fd in array.array("i", data[: len(data) - len(data) % _INT]):
                dispose(fd)
