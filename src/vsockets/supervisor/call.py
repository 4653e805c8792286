"""The environment of a handler: one intercepted system call, and the supervisor's services."""

from __future__ import annotations

import _socket
import errno
import logging
import os
import struct
from collections.abc import Awaitable, Callable, Coroutine, Generator
from socket import SOCK_CLOEXEC, SOCK_NONBLOCK
from typing import Generic, NamedTuple, TypeVar

from .._linux.descriptor_passing import dispose_of_copy
from .._linux.sockets import cookie_of
from .arch import Architecture
from .filter import Served
from .interception import CallInterrupted, InterceptedCall, Interceptor
from .process import Processes, open_memory, read_memory, write_memory
from .scheduler import Wait
from .sockets import SERVED, Endpoint, Routes, Sockets, pack_address, unpack_address
from .vsockd_client import Credentials, PortHolders, VsockdClient

log = logging.getLogger(__name__)

T = TypeVar("T")

_INT = struct.Struct("=i")
#: The longest address that the kernel accepts, in bytes (struct sockaddr_storage).
_LONGEST_ADDRESS = 128
_AF_UNIX = int(_socket.AF_UNIX)
_TYPE_FLAGS = int(SOCK_NONBLOCK | SOCK_CLOEXEC)

#: An address in a process, and the bytes to write there.
Piece = tuple[int, bytes]
#: The result of a call, not negative; None if the call has been answered already.
Answer = int | None
#: The rest of a handler, which waits, and then returns the result.
Serving = Coroutine[Wait, bool, Answer]
#: Handlers return the result, or a coroutine, which is run at once.  They fail by an OSError.
Handler = Callable[["Call"], Answer | Serving]
SocketHandler = Callable[["Call", Endpoint], Answer | Serving]


class OtherSocket(OSError):
    """A descriptor that is not the expected socket, or cannot be copied."""

    def __init__(self, code: int = errno.EBADF) -> None:
        super().__init__(code, os.strerror(code))


class Services(NamedTuple):
    """Parts of a supervisor, for the handlers of system calls; made once."""

    architecture: Architecture
    interceptor: Interceptor
    processes: Processes
    sockets: Sockets
    vsockd: VsockdClient
    ports: PortHolders
    routes: Routes
    marker: int  #: a descriptor that marks the end of a record, see ``calls.datagrams``


class _Shielded(Generic[T]):
    """The awaitable of :meth:`Call.shield`."""

    def __init__(self, call: Call, asking: Coroutine[Wait, bool, T]) -> None:
        self._call = call
        self._asking = asking

    def __await__(self) -> Generator[Wait, bool, T]:
        happened: bool = None  # type: ignore[assignment]  # starts the coroutine
        self._call.is_shielded = True
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
            self._call.is_shielded = False


def failure(code: int, why: str = "") -> OSError:
    """Return an OSError for a handler to raise; the program gets its errno."""
    return OSError(code, why or os.strerror(code))


class Call:
    """A system call, of the thread ``pid``, that waits for its answer."""

    __slots__ = ("answered", "arguments", "intercepted", "is_shielded", "pid", "services")

    def __init__(self, services: Services, intercepted: InterceptedCall) -> None:
        self.services = services
        self.intercepted = intercepted
        self.pid = intercepted.pid
        self.arguments = intercepted.arguments
        self.answered = False
        self.is_shielded = False  #: whether the handler awaits :meth:`shield`

    def integer(self, index: int) -> int:
        """Return the argument at ``index``, of C type ``int``."""
        low = self.arguments[index] & 0xFFFF_FFFF
        return low - (1 << 32) if low & 0x8000_0000 else low

    # The caller's process

    def check(self) -> None:
        """Raise CallInterrupted unless the call still waits.

        If the call still waits, all that was read before from process ``pid`` came from the caller,
        and not from another process that got its number.
        """
        if not self.intercepted.is_waiting():
            raise CallInterrupted

    def read(self, address: int, size: int) -> bytes:
        """Return ``size`` bytes of the caller's memory.

        Raises OSError(EFAULT) if any of them are not mapped, CallInterrupted if the call no longer
        waits.
        """
        data = self.read_unchecked(address, size)
        self.check()
        return data

    def read_unchecked(self, address: int, size: int) -> bytes:
        """Return ``size`` bytes of memory, which :meth:`check` proves to be the caller's.

        Call :meth:`check`, or another method that calls it, before the bytes have any effect other
        than an error of the call.

        Raises OSError(EFAULT) if any of them are not mapped.
        """
        return self.services.processes.read(self.pid, address, size)

    def write(self, *pieces: Piece) -> None:
        """Write all ``pieces`` to the caller's memory, at once.

        The memory is opened before the supervisor checks that the call still waits.  So the bytes,
        however late, reach the memory of the program that made the call, even if another thread
        executes another program meanwhile.

        Raises OSError(EFAULT) if any byte cannot be written, CallInterrupted if the call no longer
        waits.
        """
        self._write(pieces)

    def write_value(
        self, data: bytes, address: int, size_at: int, *others: Piece, cut: bool = False
    ) -> None:
        """Write an address or an option's value, and ``others``, as :meth:`write` does.

        The int at ``size_at`` is the size of the program's buffer, and becomes the size of
        ``data``; with ``cut``, the number of bytes written.

        Raises OSError(EINVAL) if the size is negative, and what :meth:`write` raises.
        """
        self._write(others, (data, address, size_at, cut))

    def write_address(self, found: tuple[int, int], address: int, size_at: int) -> None:
        """Write a struct sockaddr_vm as :meth:`write_value` does, unless ``address`` is null."""
        if address:
            self.write_value(pack_address(found), address, size_at)

    def _write(
        self, pieces: tuple[Piece, ...], value: tuple[bytes, int, int, bool] | None = None
    ) -> None:
        try:
            memory = open_memory(self.pid)
        except (FileNotFoundError, ProcessLookupError):  # the calling thread has ended
            raise CallInterrupted from None
        try:
            if value is not None:
                data, address, size_at, cut = value
                (room,) = _INT.unpack(read_memory(memory, size_at, _INT.size))
                if room < 0:
                    raise failure(errno.EINVAL)
                size = min(room, len(data)) if cut else len(data)
                pieces = (*pieces, (address, data[:room]))
                if size != room:
                    pieces = (*pieces, (size_at, _INT.pack(size)))
            if not self.intercepted.is_waiting():
                raise CallInterrupted
            for address, data in pieces:
                if data and not write_memory(memory, address, data):
                    raise CallInterrupted
        finally:
            os.close(memory)

    def duplicate(self, endpoint: Endpoint) -> _socket.socket:
        """Return a copy of the socket that the first argument names.

        Close the copy soon: while it is open, the socket's peer does not see its end.

        Raises OtherSocket if the descriptor is not this socket or cannot be copied, CallInterrupted
        if the call no longer waits.
        """
        try:
            fd = self.services.interceptor.duplicate(self.pid, self.arguments[0] & 0xFFFF_FFFF)
        except OSError as error:
            raise OtherSocket(error.errno or errno.EBADF) from None
        try:
            if not self.intercepted.is_waiting():
                raise CallInterrupted
            # A socket's cookie costs less than its inode, and no other socket ever has it.
            if not endpoint.cookie and os.fstat(fd).st_ino != endpoint.inode:
                raise OtherSocket
            sock = _socket.socket(_AF_UNIX, endpoint.type, 0, fd)
        except CallInterrupted:
            dispose_of_copy(fd)  # it may be any file: closing it can block
            raise
        except OSError:  # not this socket, or none
            dispose_of_copy(fd)
            raise OtherSocket from None
        try:
            cookie = cookie_of(sock)
        except OSError:  # not a socket
            cookie = -1
        if not endpoint.cookie:
            endpoint.cookie = cookie
        elif cookie != endpoint.cookie:
            dispose_of_copy(sock.detach())
            raise OtherSocket
        return sock

    def credentials(self) -> Credentials | None:
        """Return the credentials to send with requests to vsockd; None for the supervisor's own."""
        credentials = self.credentials_unchecked()
        if credentials is not None:
            self.check()
        return credentials

    def credentials_unchecked(self) -> Credentials | None:
        """Return the credentials as :meth:`credentials` does; :meth:`check` proves them later."""
        return self.services.vsockd.sender(self.services.processes, self.pid)

    def shield(self, asking: Coroutine[Wait, bool, T]) -> Awaitable[T]:
        """Return an awaitable that completes a request to vsockd even if a signal ends the call.

        vsockd carries out the request in any case, and the supervisor has to record the result.
        After such a signal the call counts as answered.  ``asking`` must not await
        :func:`.scheduler.lent`, whose descriptor is closed by then.
        """
        return _Shielded(self, asking)

    def require_uninterrupted(self) -> None:
        """Raise CallInterrupted if a signal has ended the call during :meth:`shield`."""
        if self.answered:
            raise CallInterrupted

    # Addresses

    def read_address(self, address: int, size: int) -> tuple[int, int] | None:
        """Return the ``(cid, port)`` of a struct sockaddr_vm, or None if it is invalid.

        Raises OSError(EINVAL) or OSError(EFAULT) where the kernel would not read it either.
        """
        found = self.read_address_unchecked(address, size)
        self.check()
        return found

    def read_address_unchecked(self, address: int, size: int) -> tuple[int, int] | None:
        """Return an address as :meth:`read_address` does; :meth:`check` proves it later."""
        if not 0 <= size <= _LONGEST_ADDRESS:
            raise failure(errno.EINVAL)
        return unpack_address(self.services.processes.read(self.pid, address, size))

    # Answers

    def answer(self, value: int) -> None:
        """Let the call return ``value``, or fail with a negative errno.

        Raises CallInterrupted if the call no longer waits.
        """
        self.answered = True
        self.intercepted.answer(value)

    def conclude(self, value: int) -> None:
        """Let the call return ``value``, now or when the thread repeats it after a signal."""
        self.answered = True
        self.services.interceptor.conclude(self.intercepted, value)

    def fail(self, error: Exception) -> None:
        """Let the call fail for ``error``, which its handler has raised, unless it is answered."""
        code = errno.EIO
        if isinstance(error, CallInterrupted):
            return
        if isinstance(error, OSError):
            code = error.errno or code
        else:  # a defect of the supervisor; the program must not wait for ever
            log.error(
                "call %d of thread %d failed", self.intercepted.number, self.pid, exc_info=error
            )
        if not self.answered:
            self.conclude(-code)

    def create_socket(self, type_: int) -> None:
        """Give the process a new vSockets socket; ``type_`` is as for socket().

        Raises CallInterrupted and OSError as :meth:`.Interceptor.answer_with_descriptor`.
        """
        plain = type_ & ~_TYPE_FLAGS
        sockets = self.services.sockets
        endpoint: Endpoint

        def created(inode: int, cookie: int) -> None:
            nonlocal endpoint
            endpoint = Endpoint(plain, inode, cookie)
            sockets.add(inode, endpoint)

        create = self.services.interceptor.create_socket
        number = create(self.intercepted, type_, SERVED.get(plain), created)
        self.answered = True
        sockets.expect(self.pid, number, endpoint)

    def answer_with_descriptor(
        self, fd: int, close_on_exec: bool, data_calls: Served | None = None
    ) -> None:
        """Give the process a copy of ``fd``, and let the call return its number.

        Raises CallInterrupted and OSError as :meth:`.Interceptor.answer_with_descriptor`.
        """
        interceptor = self.services.interceptor
        interceptor.answer_with_descriptor(self.intercepted, fd, close_on_exec, data_calls)
        self.answered = True

    def let_through(self) -> None:
        """Let the kernel perform the call.

        Raises CallInterrupted if the call no longer waits.
        """
        self.answered = True
        self.intercepted.let_through()
