"""The request that vsockd serves, in memory that outlives vsockd.

vsockd serves one request at a time.  If it is killed meanwhile, the next one has to continue where
it has stopped: a reply or a descriptor that was sent must not be sent again, and one that was not
sent must not be left out.  No instruction after a system call can record that the call was made,
because the process may be killed before it.  But sendmmsg(2) and recvmmsg(2) themselves write to
memory how many bytes they have moved.  That memory is shared here by vsockd and the process that
starts it again (:mod:`.holder`).

A request is served in these steps.  Its bytes stay in the client's socket until it is served::

    begin or accept     this memory: the channel, no step done
    (peek, decide)      nothing is visible outside yet: the next vsockd serves the request again
    commit              the journal: what has changed, and what is left to do (journal.py)
    REPLY, CONSUME, ANNOUNCE    each is done once
    end
"""

from __future__ import annotations

import _socket
import ctypes
import mmap
import struct
from collections.abc import Callable
from enum import IntEnum
from socket import CMSG_LEN, CMSG_SPACE, MSG_DONTWAIT, MSG_NOSIGNAL, SCM_RIGHTS, SOL_SOCKET

from .._linux.libc import last_error
from ..protocol import PADDING, REQUEST_SIZE

_library = ctypes.PyDLL(None, use_errno=True)  # neither call blocks, so the GIL is kept
_sendmmsg, _recvmmsg = _library.sendmmsg, _library.recvmmsg
_SEND, _RECEIVE = int(MSG_DONTWAIT | MSG_NOSIGNAL), int(MSG_DONTWAIT)
_FD = struct.Struct("i")
#: A control message with one descriptor: its length, level, type, and the descriptor.
_RIGHTS = struct.Struct("Niii0N")
_RIGHTS_START = CMSG_LEN(_FD.size), int(SOL_SOCKET), int(SCM_RIGHTS)


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


class _Header(ctypes.Structure):
    """``struct msghdr``."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint32),
        ("iov", ctypes.c_void_p),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Message(ctypes.Structure):
    """``struct mmsghdr``."""

    _fields_ = (("header", _Header), ("len", ctypes.c_uint32))


class Step(IntEnum):
    """A system call that the outside sees."""

    REPLY = 0
    CONSUME = 1
    ANNOUNCE = 2
    #: not of a request: the last message to the vsockd that replaces this one
    HAND_OVER = 3


_STEPS = len(Step)
_CONSUME = Step.CONSUME
#: The longest message of a step.
IN_FLIGHT_MAX_BYTES = 16_384
assert REQUEST_SIZE + len(PADDING) <= IN_FLIGHT_MAX_BYTES


class _Request(ctypes.Structure):
    """The request being served; set as a whole when the next one begins."""

    _fields_ = (
        ("serving", ctypes.c_uint32),
        ("fd", ctypes.c_int32),
        ("cid", ctypes.c_uint32),
        ("kind", ctypes.c_uint32),
        ("committed", ctypes.c_uint64),
        ("messages", _Message * Step.HAND_OVER),
    )


class _Memory(ctypes.Structure):
    _fields_ = (
        ("request", _Request),
        ("hand_over", _Message),
        ("doomed", ctypes.c_int32),
        ("journal", ctypes.c_int32),
        ("folder", ctypes.c_int32),
        ("vectors", _Vector * _STEPS),
        ("controls", (ctypes.c_char * CMSG_SPACE(_FD.size)) * _STEPS),
        ("records", (ctypes.c_char * IN_FLIGHT_MAX_BYTES) * _STEPS),
    )


class InFlight:
    """The memory that vsockd shares with its holder, at one address in all processes."""

    def __init__(self) -> None:
        """Start without a request and without a journal."""
        size = ctypes.sizeof(_Memory)
        self._map = mmap.mmap(-1, (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE)
        self.memory = memory = _Memory.from_buffer(self._map)
        memory.doomed = memory.journal = memory.folder = -1
        start = ctypes.addressof(memory)
        request = memory.request
        request.fd = -1
        self._messages = [*request.messages, memory.hand_over]
        self._vectors = [memory.vectors[step] for step in Step]
        self._addresses = [ctypes.c_void_p(ctypes.addressof(one)) for one in self._messages]
        self._records = []
        self._controls = []
        for step in Step:
            record, control = memory.records[step], memory.controls[step]
            self._records.append(ctypes.addressof(record) - start)
            self._controls.append(ctypes.addressof(control) - start)
            self._vectors[step].base = ctypes.addressof(record)
            header = self._messages[step].header
            header.iov, header.iovlen = ctypes.addressof(self._vectors[step]), 1
            header.control = ctypes.addressof(control)
        self._idle = bytes(request)
        request.serving = 1
        self._fresh = bytes(request)
        request.serving = 0
        self._size = len(self._idle)

    def accepting(
        self, cid: int, kind: int, accept: Callable[[], tuple[int, object]]
    ) -> Callable[[], tuple[int, object]]:
        """Return ``accept`` preceded by :meth:`begin` for the channel that it will return."""
        size, mapped = self._size, self._map
        request = _Request.from_buffer_copy(self._fresh)
        request.cid, request.kind = cid, kind
        fresh = bytes(request)

        def accept_marked() -> tuple[int, object]:
            mapped[:size] = fresh
            return accept()

        return accept_marked

    def begin(self, fd: int) -> None:
        """Begin with a request on a channel that the journal has."""
        self._map[: self._size] = self._fresh
        self.memory.request.fd = fd

    def end(self) -> None:
        """Finish the request, after its channel is closed or in the journal."""
        self._map[: self._size] = self._idle

    @property
    def request(self) -> _Request:
        """The request being served."""
        request: _Request = self.memory.request
        return request

    def is_done(self, step: Step) -> bool:
        """Return whether this vsockd or the one before has done a step."""
        return bool(self._messages[step].len)

    def send(self, step: Step, sock: _socket.socket, record: bytes, fd: int = -1) -> None:
        """Send a record once, with a descriptor if ``fd`` is given.

        Raises OSError.
        """
        message = self._messages[step]
        if message.len:
            return
        at = self._records[step]
        self._map[at : at + len(record)] = record
        self._vectors[step].len = len(record)
        if fd >= 0:
            _RIGHTS.pack_into(self._map, self._controls[step], *_RIGHTS_START, fd)
            message.header.controllen = CMSG_SPACE(_FD.size)
        if _sendmmsg(sock.fileno(), self._addresses[step], 1, _SEND) < 0:
            raise last_error()

    def consume(self, sock: _socket.socket, size: int) -> None:
        """Read and discard up to ``size`` bytes once.

        Raises OSError.
        """
        message = self._messages[_CONSUME]
        if message.len:
            return
        self._vectors[_CONSUME].len = size
        if _recvmmsg(sock.fileno(), self._addresses[_CONSUME], 1, _RECEIVE, None) < 0:
            raise last_error()
