"""One intercepted system call: its arguments, its process's memory, its answer."""

from __future__ import annotations

import _socket
import errno
import os
import struct
from collections.abc import Awaitable, Callable, Coroutine, Generator
from socket import SOCK_CLOEXEC, SOCK_NONBLOCK
from typing import Generic, TypeVar

from .filter import Served
from .interception import CallInterrupted, InterceptedCall
from .process import write_memory
from .scheduler import Wait
from .services import Services
from .sockets import SERVED, Endpoint, pack_address, unpack_address
from .vsockd_client import Asker

T = TypeVar("T")

_INT = struct.Struct("=i")
#: The kernel takes no longer addresses (struct sockaddr_storage).
_LONGEST_ADDRESS = 128
_AF_UNIX = int(_socket.AF_UNIX)
_TYPE_FLAGS = int(SOCK_NONBLOCK | SOCK_CLOEXEC)

#: Bytes to be written at an address of a process.
Piece = tuple[int, bytes]
#: What a call returns, not negative; None when it has its answer already.
Answer = int | None
Serving = Coroutine[Wait, bool, Answer]
Handler = Callable[["Call"], Serving]
SocketHandler = Callable[["Call", Endpoint], Serving]


class _CarriedThrough(Generic[T]):
    """See :meth:`Call.carry_through`."""

    def __init__(self, call: Call, asking: Coroutine[Wait, bool, T]) -> None:
        self._call = call
        self._asking = asking

    def __await__(self) -> Generator[Wait, bool, T]:
        happened: bool = None  # type: ignore[assignment]  # which begins a coroutine
        self._call.is_carried = True
        try:
            while True:
                try:
                    wait = self._asking.send(happened)
                except StopIteration as stop:
                    return stop.value  # type: ignore[no-any-return]
                while True:
                    try:
                        happened = yield wait
                        break
                    except CallInterrupted:
                        self._call.answered = True
        finally:
            self._call.is_carried = False


def failure(code: int, why: str = "") -> OSError:
    """An OSError to be raised by a handler; the program gets its errno."""
    return OSError(code, why or os.strerror(code))


class Call:
    """A system call that waits, of the thread ``pid``."""

    __slots__ = ("answered", "arguments", "intercepted", "is_carried", "pid", "services")

    def __init__(self, services: Services, intercepted: InterceptedCall) -> None:
        self.services = services
        self.intercepted = intercepted
        self.pid = intercepted.pid
        self.arguments = intercepted.arguments
        self.answered = False
        self.is_carried = False  #: awaits vsockd in :meth:`carry_through`

    def integer(self, index: int) -> int:
        """Return an argument of type ``int``."""
        low = self.arguments[index] & 0xFFFF_FFFF
        return low - (1 << 32) if low & 0x8000_0000 else low

    # Its process

    def check(self) -> None:
        """Raise CallInterrupted unless the call still waits.

        Whatever was read before of the process with its number was then read of the caller.
        """
        if not self.services.interceptor.is_waiting(self.intercepted):
            raise CallInterrupted

    def read(self, address: int, size: int) -> bytes:
        """Its process's memory; OSError EFAULT."""
        data = self.services.processes.read(self.pid, address, size)
        self.check()
        return data

    def write(self, *pieces: Piece) -> None:
        """Write into its process's memory, all that the call writes at once; OSError EFAULT.

        The memory is opened first, and the call still waits afterwards: so what is written, however
        late, is written to the memory of the program that made the call, and not to that of one
        that another thread executes meanwhile.
        """
        if not pieces:
            return
        try:
            with self.services.processes.opened_memory(self.pid) as memory:
                self.check()
                for address, data in pieces:
                    if data and not write_memory(memory, address, data):
                        raise CallInterrupted
        except (FileNotFoundError, ProcessLookupError):  # its thread has ended
            raise CallInterrupted from None

    def duplicate(self, endpoint: Endpoint) -> _socket.socket:
        """Return a copy of the socket that the first argument names; OSError EBADF when the
        number is another's by now.  Close it soon, see ``sockets``.
        """
        fd = self.services.interceptor.duplicate(self.pid, self.integer(0))
        try:
            self.check()
            if os.fstat(fd).st_ino != endpoint.inode:
                raise failure(errno.EBADF)
            return _socket.socket(_AF_UNIX, endpoint.type, 0, fd)
        except BaseException:
            os.close(fd)
            raise

    def asker(self) -> Asker | None:
        """Return in whose name to ask vsockd; None when the supervisor asks in its own."""
        return self.services.vsockd.asker(self._credentials)

    def _credentials(self) -> Asker:
        credentials = self.services.processes.credentials(self.pid)
        self.check()
        return credentials

    def carry_through(self, asking: Coroutine[Wait, bool, T]) -> Awaitable[T]:
        """Await vsockd's answer, also when a signal has interrupted the call and its thread goes on
        to something else: vsockd does what it was asked, and the supervisor must know.

        Then the call counts as answered.  Nothing ``asking`` awaits may be :func:`.waiting.lent`.
        """
        return _CarriedThrough(self, asking)

    def require_waiting(self) -> None:
        """Raise CallInterrupted if the thread has gone on (:meth:`carry_through`)."""
        if self.answered:
            raise CallInterrupted

    # Addresses

    def read_address(self, address: int, size: int) -> tuple[int, int] | None:
        """Return the ``(cid, port)`` of a struct sockaddr_vm, None if it is invalid.

        OSError EINVAL or EFAULT when the kernel would not even read it.
        """
        if not 0 <= size <= _LONGEST_ADDRESS:
            raise failure(errno.EINVAL)
        return unpack_address(self.read(address, size))

    def sized(self, data: bytes, address: int, size_at: int, cut: bool = False) -> list[Piece]:
        """Return what to write for an address or an option: at ``size_at`` is how many bytes there
        is room for, and then how many there were (with ``cut``, how many were written).
        """
        (room,) = _INT.unpack(self.read(size_at, _INT.size))
        if room < 0:
            raise failure(errno.EINVAL)
        size = min(room, len(data)) if cut else len(data)
        return [(address, data[:room]), (size_at, _INT.pack(size))]

    def address(self, found: tuple[int, int], address: int, size_at: int) -> list[Piece]:
        """Return what to write for a struct sockaddr_vm; nothing when the program wants none."""
        return self.sized(pack_address(found), address, size_at) if address else []

    # Its answer

    def answer(self, value: int) -> None:
        """Return ``value``, or fail with a negative errno.  Raises CallInterrupted."""
        self.answered = True
        self.services.interceptor.answer(self.intercepted, value)

    def conclude(self, value: int) -> None:
        """Return ``value``, now or when the thread repeats the call."""
        self.answered = True
        self.services.interceptor.conclude(self.intercepted, value)

    def create_socket(self, type_: int) -> None:
        """Give the process a new vSockets socket; ``type_`` is as for socket().

        Raises CallInterrupted or OSError.
        """
        plain = type_ & ~_TYPE_FLAGS
        sockets = self.services.sockets

        def created(inode: int, cookie: int) -> None:
            sockets.add(inode, Endpoint(plain, inode, cookie))

        data_calls = SERVED.get(plain)
        self.services.interceptor.create_socket(self.intercepted, type_, data_calls, created)
        self.answered = True

    def answer_with_socket(self, sock: _socket.socket, endpoint: Endpoint, flags: int) -> None:
        """Give the process a copy of ``sock``; ``flags`` are accept4()'s.

        Raises CallInterrupted or OSError.
        """
        self._answer_with(sock.fileno(), bool(flags & SOCK_CLOEXEC), endpoint.served)

    def answer_with_descriptor(self, fd: int, close_on_exec: bool) -> None:
        """Give the process a copy of ``fd``, and return its number.

        Raises CallInterrupted or OSError.
        """
        self._answer_with(fd, close_on_exec, None)

    def _answer_with(self, fd: int, close_on_exec: bool, data_calls: Served | None) -> None:
        interceptor = self.services.interceptor
        interceptor.answer_with_descriptor(self.intercepted, fd, close_on_exec, data_calls)
        self.answered = True

    def let_through(self) -> None:
        """Let the kernel perform the call.  Raises CallInterrupted."""
        self.answered = True
        self.services.interceptor.let_through(self.intercepted)
