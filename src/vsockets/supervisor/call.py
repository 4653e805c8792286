"""One intercepted system call: its arguments, its process's memory, its answer."""

from __future__ import annotations

import _socket
import errno
import os
import socket
import struct
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING

from ..constants import AF_VSOCK
from .notification import Gone, Notification
from .sockets import SOCKADDR_SIZE, Endpoint, pack_address, unpack_address
from .waiting import Wait

if TYPE_CHECKING:
    from .supervisor import Supervisor

_INT = struct.Struct("=i")
#: The kernel takes no longer addresses (struct sockaddr_storage).
_LONGEST_ADDRESS = 128
_AF_UNIX = int(socket.AF_UNIX)

#: What a call returns, not negative; None when it has its answer already.
Answer = int | None
Serving = Coroutine[Wait, bool, Answer]
Handler = Callable[["Call"], Serving]
SocketHandler = Callable[["Call", Endpoint], Serving]


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

    def is_same_as(self, other: Call) -> bool:
        """Whether it is the other call made again: the kernel restarts what a signal stopped."""
        return (self.number, self.instruction, self.arguments) == (
            other.number,
            other.instruction,
            other.arguments,
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

    def write(self, address: int, data: bytes) -> None:
        """Write into its process's memory; OSError EFAULT."""
        self.check()
        self.supervisor.processes.write(self.pid, address, data)

    def duplicate(self, type_: int, index: int = 0) -> _socket.socket:
        """A copy of the socket that an argument names.  Close it soon, see ``sockets``."""
        fd = self.supervisor.processes.duplicate(self.pid, self.integer(index))
        try:
            self.check()
            return _socket.socket(_AF_UNIX, type_, 0, fd)
        except BaseException:
            os.close(fd)
            raise

    # Addresses

    def read_address(self, address: int, size: int) -> tuple[int, int]:
        """The ``(cid, port)`` of a struct sockaddr_vm; OSError EINVAL or EFAULT as Linux."""
        if not 0 <= size <= _LONGEST_ADDRESS:
            raise failure(errno.EINVAL)
        family, found = unpack_address(self.read(address, size).ljust(SOCKADDR_SIZE, b"\0")[:16])
        if size < SOCKADDR_SIZE or family != AF_VSOCK:
            raise failure(errno.EINVAL, f"an address of {size} bytes and family {family}")
        return found

    def write_sized(self, data: bytes, address: int, size_at: int, cut: bool = False) -> None:
        """Write an address or an option; at ``size_at`` is how many bytes there is room for,
        and then how many there were (with ``cut``, how many were written).
        """
        (room,) = _INT.unpack(self.read(size_at, _INT.size))
        if room < 0:
            raise failure(errno.EINVAL)
        self.write(address, data[:room])
        self.write(size_at, _INT.pack(min(room, len(data)) if cut else len(data)))

    def write_address(self, found: tuple[int, int], address: int, size_at: int) -> None:
        """Write a struct sockaddr_vm; does nothing when the program wants none."""
        if address:
            self.write_sized(pack_address(found), address, size_at)

    # Its answer

    def answer(self, value: int) -> None:
        """Return ``value``, or fail with a negative errno; raises Gone."""
        self.answered = True
        self.supervisor.listener.answer(self.id, value)

    def answer_with_descriptor(self, fd: int, close_on_exec: bool, number: int | None) -> None:
        """Give the process a copy of ``fd``, the call returns it; raises Gone or OSError."""
        self.supervisor.listener.answer_with_descriptor(self.id, fd, close_on_exec, number)
        self.answered = True

    def let_through(self) -> None:
        """Let the kernel do it; see :meth:`Listener.let_through`."""
        self.answered = True
        self.supervisor.listener.let_through(self.id)
