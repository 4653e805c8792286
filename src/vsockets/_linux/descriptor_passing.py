"""Protection of sockets against unwanted descriptors in received messages (SCM_RIGHTS).

A receiver that does not take a descriptor out of a message still pays for it: its next ``recv``,
``splice`` or ``close`` closes the descriptor, in the calling thread.  The close can block for as
long as the sender chooses, if the descriptor is a TCP socket with SO_LINGER or a file on FUSE.

Since Linux 6.16 a socket can refuse descriptors (SO_PASSRIGHTS); the sender gets EPERM.  On older
kernels a guarded socket receives descriptors, and passes them to threads that close them.
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

#: The largest number of descriptors in one message (SCM_MAX_FD).
_MOST = 253
_INT = array.array("i").itemsize
_ROOM = CMSG_SPACE(_MOST * _INT)
_CLOEXEC = int(MSG_CMSG_CLOEXEC)
_NO_LINGER = struct.pack("ii", 0, 0)

Socket = TypeVar("Socket", bound=stdlib.socket)

#: The family of a socket in the kernel; a vSockets socket overrides the property.
_raw_family = _socket.socket.family.__get__

# Closing


class _CloserThreads:
    """Threads that close descriptors; while any of them is blocked, another one is ready."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[int, bool, Callable[[], None]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = self._ready = 0

    def put(self, fd: int, lingers: bool, closed: Callable[[], None]) -> None:
        self._queue.put((fd, lingers, closed))
        if not self._threads:
            self._ensure_ready()

    def _ensure_ready(self) -> None:
        with self._lock:
            if self._ready or self._threads >= DESCRIPTOR_CLOSE_THREADS_MAX:
                return
            self._threads += 1
            self._ready += 1
        threading.Thread(target=self._close_all, name="closer", daemon=True).start()

    def _close_all(self) -> None:
        while True:
            fd, lingers, closed = self._queue.get()
            with self._lock:
                self._ready -= 1
            self._ensure_ready()
            if not lingers:
                with contextlib.suppress(OSError):
                    _clear_linger(fd)
            with contextlib.suppress(OSError):
                os.close(fd)
            closed()
            with self._lock:
                self._ready += 1


def _clear_linger(fd: int) -> None:
    """Clear SO_LINGER of the socket ``fd``.

    Raises OSError if ``fd`` is not a socket.
    """
    sock = _socket.socket(fileno=fd)
    try:
        sock.setsockopt(SOL_SOCKET, stdlib.SO_LINGER, _NO_LINGER)
    finally:
        sock.detach()


_closers = _CloserThreads()


def dispose(fd: int, closed: Callable[[], None] = lambda: None) -> None:
    """Close ``fd`` without SO_LINGER in another thread, which calls ``closed`` afterwards."""
    _closers.put(fd, False, closed)


def dispose_of_copy(fd: int) -> None:
    """Close a copy of another process's descriptor in another thread; leave the file unchanged."""
    _closers.put(fd, True, lambda: None)


def close_in_thread(sock: stdlib.socket) -> None:
    """Close ``sock`` and the descriptors in its receive queue in another thread; do not wait."""
    if sock.fileno() >= 0:
        dispose(sock.detach())


# Receiving


def guard(sock: Socket) -> Socket:
    """Protect ``sock`` against received descriptors, and return it.

    The socket must not be bound or connected yet.  Before Linux 6.16 the caller must read with the
    socket's methods ``recv``, ``recv_into`` or ``recvfrom``: see :func:`is_guarded`.
    """
    if _raw_family(sock) == AF_UNIX and not refuse_descriptors(sock):
        _become_guarded(sock)
    return sock


def guard_accepted(sock: Socket) -> Socket:
    """Protect ``sock``, whose receive queue may already contain descriptors, and return it."""
    if _raw_family(sock) == AF_UNIX and not _refuses(sock):
        refuse_descriptors(sock)
        _become_guarded(sock)
    return sock


def receive(sock: _socket.socket, size: int, flags: int = 0) -> bytes:
    """Receive up to ``size`` bytes; have descriptors in the message closed by another thread."""
    data, ancillary, *_ = _socket.socket.recvmsg(sock, size, _ROOM, flags | _CLOEXEC)
    if ancillary:
        _close_received(ancillary)
    return data


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
    """Return whether ``sock`` is protected by its own methods, which ``splice`` would bypass."""
    return isinstance(sock, _Guarded)


if TYPE_CHECKING:
    _Mixin = stdlib.socket
else:
    # Mixed into classes of existing sockets: socket.socket as a base would change their layout.
    _Mixin = object


class _Guarded(_Mixin):
    """A socket that receives descriptors, and has them closed by other threads."""

    __slots__ = ()

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        return self.recvfrom(bufsize, flags)[0]

    def recvfrom(self, bufsize: int, flags: int = 0, /) -> tuple[bytes, Any]:
        data, ancillary, _, address = super().recvmsg(bufsize, _ROOM, flags | _CLOEXEC)
        if ancillary:
            _close_received(ancillary)
        return data, address

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        view = memoryview(buffer).cast("B")
        buffers = [view[:nbytes] if nbytes else view]
        size: int
        size, ancillary, *_ = super().recvmsg_into(buffers, _ROOM, flags | _CLOEXEC)
        if ancillary:
            _close_received(ancillary)
        return size

    def close(self) -> None:
        """Close the socket and the descriptors in its receive queue in another thread."""
        if self.fileno() >= 0 and self.type != stdlib.SOCK_DGRAM:
            with contextlib.suppress(OSError):  # the peer sees the end of the stream at once
                _socket.socket.shutdown(self, SHUT_RDWR)
        close_in_thread(self)
        super().close()


_guarded_classes: dict[type[stdlib.socket], type[Any]] = {}


def _close_received(ancillary: list[tuple[int, int, bytes]]) -> None:
    for level, kind, data in ancillary:
        if level == SOL_SOCKET and kind == SCM_RIGHTS:
            for fd in array.array("i", data[: len(data) - len(data) % _INT]):
                dispose(fd)
