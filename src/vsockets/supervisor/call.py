"""One intercepted system call: its arguments, its process's memory, its answer."""

from __future__ import annotations

import _socket
import errno
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Generic, TypeVar

from .notification import Gone, Notification
from .process import write_memory
from .scheduler import Wait
from .sockets import Endpoint, pack_address, unpack_address
from .vsockd_client import Asker

if TYPE_CHECKING:
    from .ptrace import SystemCall
    from .supervisor import Supervisor
    from .tracing import Tracee

T = TypeVar("T")

_INT = struct.Struct("=i")
#: The kernel takes no longer addresses (struct sockaddr_storage).
_LONGEST_ADDRESS = 128
_AF_UNIX = int(socket.AF_UNIX)

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
        while True:
            try:
                wait = self._asking.send(happened)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            while True:
                try:
                    happened = yield wait
                    break
                except Gone:
                    self._call.answered = True


def failure(code: int, why: str = "") -> OSError:
    """An OSError to be raised by a handler; the program gets its errno."""
    return OSError(code, why or os.strerror(code))


class Call:
    """A system call that waits, of the thread ``pid``."""

    __slots__ = ("answered", "arguments", "id", "instruction", "number", "pid", "supervisor")

    def __init__(self, supervisor: Supervisor, notification: Notification) -> None:
        self.supervisor = supervisor
        self.id = notification.id
        self.pid = notification.pid
        self.number = notification.number
        self.instruction = notification.instruction
        self.arguments = notification.arguments
        self.answered = False

    def integer(self, index: int) -> int:
        """An argument of type ``int``."""
        low = self.arguments[index] & 0xFFFF_FFFF
        return low - (1 << 32) if low & 0x8000_0000 else low

    def is_same_as(self, other: Call, used: int) -> bool:
        """Return whether it is the other call made again, by the kernel after a signal, or by a
        program that was told EINTR.  The registers of no argument, after the ``used`` first, may
        have changed since.
        """
        return (self.number, self.instruction, self.arguments[:used]) == (
            other.number,
            other.instruction,
            other.arguments[:used],
        )

    # Its process

    def check(self) -> None:
        """Raises Gone unless what was read since the call came was read of its process."""
        if not self.supervisor.listener.is_valid(self.id):
            raise Gone

    def read(self, address: int, size: int) -> bytes:
        """Its process's memory; OSError EFAULT."""
        data = self.supervisor.processes.read(self.pid, address, size)
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
            with self.supervisor.processes.opened_memory(self.pid) as memory:
                self.check()
                for address, data in pieces:
                    if data and not write_memory(memory, address, data):
                        raise Gone
        except (FileNotFoundError, ProcessLookupError):  # its thread has ended
            raise Gone from None

    def duplicate(self, endpoint: Endpoint) -> _socket.socket:
        """Return a copy of the socket that the first argument names; OSError EBADF when the
        number is another's by now.  Close it soon, see ``sockets``.
        """
        fd = self.supervisor.processes.duplicate(self.pid, self.integer(0))
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
        return self.supervisor.vsockd.asker(self._credentials)

    def _credentials(self) -> Asker:
        credentials = self.supervisor.processes.credentials(self.pid)
        self.check()
        return credentials

    def carry_through(self, asking: Coroutine[Wait, bool, T]) -> Awaitable[T]:
        """Await vsockd's answer, also when a signal has interrupted the call and its thread goes on
        to something else: vsockd does what it was asked, and the supervisor must know.

        Then the call counts as answered.  Nothing ``asking`` awaits may be :func:`.waiting.lent`.
        """
        return _CarriedThrough(self, asking)

    def require_waiting(self) -> None:
        """Raise Gone when the thread goes on to something else (:meth:`carry_through`)."""
        if self.answered:
            raise Gone

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
        """Return ``value``, or fail with a negative errno; raises Gone."""
        self.answered = True
        self.supervisor.listener.answer(self.id, value)

    def answer_with_descriptor(self, fd: int, close_on_exec: bool) -> None:
        """Give the process a copy of ``fd``, the call returns it; raises Gone or OSError."""
        self.supervisor.listener.answer_with_descriptor(self.id, fd, close_on_exec)
        self.answered = True

    def add_descriptor(self, fd: int, close_on_exec: bool) -> int:
        """Give the process a copy of ``fd``; returns its number there.  Raises Gone or OSError."""
        return self.supervisor.listener.add_descriptor(self.id, fd, close_on_exec)

    def let_through(self) -> None:
        """Let the kernel do it; see :meth:`Listener.let_through`."""
        self.answered = True
        self.supervisor.listener.let_through(self.id)

    def conclude(self, value: int) -> None:
        """Return ``value``, now or when the thread makes the call again."""
        self.supervisor.give(self, value)


class TracedCall(Call):
    """A call that a tracer has stopped."""

    __slots__ = ("_call", "thread")

    def __init__(self, supervisor: Supervisor, thread: Tracee, call: SystemCall) -> None:
        number, architecture, instruction, arguments, _ = call
        super().__init__(
            supervisor,
            Notification(0, thread.number, number, architecture, instruction, arguments),
        )
        self.thread = thread
        self._call = call

    def check(self) -> None:
        if self.thread.call is not self._call:
            raise Gone

    def answer(self, value: int) -> None:
        self.answered = True
        self.supervisor.tracer.answer(self.thread, value)

    def let_through(self) -> None:
        self.answered = True
        self.supervisor.tracer.let_through(self.thread)

    def conclude(self, value: int) -> None:
        self.answer(value)
