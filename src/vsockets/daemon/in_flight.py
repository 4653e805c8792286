"""The request that vsockd serves, in memory that outlives vsockd.

vsockd serves one request at a time.  If it is killed meanwhile, the next one has to continue where
it has stopped: a reply or a descriptor that was sent must not be sent again, and one that was not
sent must not be left out.  No instruction after a system call can record that the call was made,
because the process may be killed before it.  But sendmmsg(2) and recvmmsg(2) themselves write to
memory how many bytes they have moved.  That memory is shared here by vsockd and the process that
starts it again (:mod:`.holder`).

A request is served in these steps::

    begin or accept     this memory: the channel, no step done
    READ                the request's bytes and its author are in this memory
    (decide)            nothing is visible outside yet: the next vsockd serves the request again
    commit              the journal: what has changed, and what is left to do (journal.py)
    REPLY, CONSUME, ANNOUNCE    each is done once
    end

A request on a packet socket, which may have a descriptor, is peeked at instead and stays in the
socket until CONSUME.  So does a message on a device's link until TAKE, the last step, which comes
after those of a request that it has brought.
"""

from __future__ import annotations

import _socket
import ctypes
import mmap
import struct
from collections.abc import Callable
from enum import IntEnum
from socket import CMSG_LEN, CMSG_SPACE, MSG_DONTWAIT, MSG_NOSIGNAL, SCM_RIGHTS, SOL_SOCKET
from typing import NamedTuple

from .._linux.libc import last_error
from ..protocol import PADDING, REQUEST_SIZE, Request
from .credentials import UCRED

_library = ctypes.PyDLL(None, use_errno=True)  # neither call blocks, so the GIL is kept
_sendmmsg, _recvmmsg = _library.sendmmsg, _library.recvmmsg
_SEND, _RECEIVE = int(MSG_DONTWAIT | MSG_NOSIGNAL), int(MSG_DONTWAIT)
_FD = struct.Struct("i")
#: The fields of a request that identify its channel.
_CHANNEL = struct.Struct("iII")
#: The head of a control message: its length, level and type.
_CONTROL = struct.Struct("Nii")
_RIGHTS = CMSG_LEN(_FD.size), int(SOL_SOCKET), int(SCM_RIGHTS)
_RIGHTS_SPACE = CMSG_SPACE(_FD.size)
#: A control message with credentials.
_AUTHOR = struct.Struct("Nii" + UCRED.format)
#: Space for it, and for nothing else.
_AUTHOR_SPACE = CMSG_LEN(UCRED.size)


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
    """A system call whose effect other processes see."""

    REPLY = 0
    CONSUME = 1
    ANNOUNCE = 2
    READ = 3
    TAKE = 4
    #: not of a request: the last message to the vsockd that replaces this one
    HAND_OVER = 5


#: The kind of a channel with the hybrid handshake.
HYBRID = 2
_STEPS = len(Step)
_CONSUME, _READ = Step.CONSUME, Step.READ
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
        ("author", ctypes.c_char * _AUTHOR.size),
    )


_FD_AT, _COMMITTED_AT = _Request.fd.offset, _Request.committed.offset
_AUTHOR_AT = _Request.author.offset
_SERIAL = struct.Struct("Q")


class _Memory(ctypes.Structure):
    _fields_ = (
        ("request", _Request),
        ("hand_over", _Message),
        ("doomed", ctypes.c_int32),
        ("journal", ctypes.c_int32),
        ("folder", ctypes.c_int32),
        ("vectors", _Vector * _STEPS),
        ("controls", (ctypes.c_char * _RIGHTS_SPACE) * _STEPS),
        ("records", (ctypes.c_char * IN_FLIGHT_MAX_BYTES) * _STEPS),
    )


class _Call(NamedTuple):
    """The system call of a step: its message, and where in the memory its parts are."""

    message: _Message
    header: _Header
    vector: _Vector
    argument: object  #: a pointer to the message
    record: int  #: offset of the data
    descriptor: int  #: offset of the descriptor that is sent


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
        self._calls = []
        for step in Step:
            message = memory.hand_over if step is Step.HAND_OVER else request.messages[step]
            header, vector = message.header, memory.vectors[step]
            record = ctypes.addressof(memory.records[step])
            control = ctypes.addressof(memory.controls[step])
            vector.base = record
            header.iov, header.iovlen = ctypes.addressof(vector), 1
            header.control = control
            _CONTROL.pack_into(self._map, control - start, *_RIGHTS)
            at = control - start + _CONTROL.size
            pointer = ctypes.byref(message)
            self._calls.append(_Call(message, header, vector, pointer, record - start, at))
        read = self._calls[_READ]
        read.vector.len = REQUEST_SIZE
        read.header.control, read.header.controllen = start + _AUTHOR_AT, _AUTHOR_SPACE
        self._idle = bytes(request)
        request.serving = 1
        self._fresh = bytes(request)
        request.serving = 0
        self._size = len(self._idle)

    def accepting(
        self, cid: int, kind: int, accept: Callable[[], tuple[int, object]]
    ) -> Callable[[], tuple[int, object]]:
        """Return ``accept`` preceded by :meth:`begin` for the channel that it will return.

        ``cid`` is that of the channel's context, ``kind`` 1 if it is a packet socket.  With
        ``kind`` HYBRID the channel is the handshake's, and ``cid`` the guest's.
        """
        size, mapped = self._size, self._map
        request = _Request.from_buffer_copy(self._fresh)
        request.cid, request.kind = cid, kind
        fresh = bytes(request)

        def accept_marked() -> tuple[int, object]:
            mapped[:size] = fresh
            return accept()

        return accept_marked

    def begin(self, fd: int, cid: int = 0, kind: int = 0) -> None:
        """Begin to serve a request on a channel that is in the journal, or another message.

        ``cid`` and ``kind`` are those of :meth:`accepting`.
        """
        self._map[: self._size] = self._fresh
        _CHANNEL.pack_into(self._map, _FD_AT, fd, cid, kind)

    def begin_next(self) -> None:
        """Begin with the next request on the same channel: this one has been served."""
        for message in self.request.messages:
            message.len = 0

    def commit(self, serial: int) -> None:
        """Store the number of the request's journal entry, which is written next."""
        _SERIAL.pack_into(self._map, _COMMITTED_AT, serial)

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
        return bool(self._calls[step].message.len)

    def send(self, step: Step, sock: _socket.socket, record: bytes, fd: int = -1) -> None:
        """Send a record once, with a descriptor if ``fd`` is given.

        Raises OSError.
        """
        message, header, vector, argument, at, descriptor = self._calls[step]
        if message.len:
            return
        size = len(record)
        self._map[at : at + size] = record
        vector.len = size
        if fd >= 0:
            _FD.pack_into(self._map, descriptor, fd)
            header.controllen = _RIGHTS_SPACE
        if _sendmmsg(sock.fileno(), argument, 1, _SEND) < 0:
            raise last_error()

    def read(
        self, sock: _socket.socket, size: int = REQUEST_SIZE
    ) -> tuple[bytes, tuple[int, ...] | None]:
        """Read a request once; return it, and its author's credentials if they came with it.

        ``size`` is the largest number of bytes to read.

        Raises OSError, BlockingIOError if no request has arrived.
        """
        message, _, vector, argument, at, _ = self._calls[_READ]
        vector.len = size
        size = message.len
        if not size:
            if _recvmmsg(sock.fileno(), argument, 1, _RECEIVE, None) < 0:
                raise last_error()
            size = message.len
        length, _, _, *author = _AUTHOR.unpack_from(self._map, _AUTHOR_AT)
        return self._map[at : at + size], tuple(author) if length else None

    @property
    def is_polling(self) -> bool:
        """True if padding follows the request that was read."""
        message, _, _, _, at, _ = self._calls[_READ]
        return message.len == REQUEST_SIZE and (
            Request.decode(self._map[at : at + REQUEST_SIZE]).polling
        )

    def consume(self, sock: _socket.socket, size: int, step: Step = _CONSUME) -> None:
        """Read and discard up to ``size`` bytes once, or another ``step`` of this kind.

        Raises OSError.
        """
        message, _, vector, argument, _, _ = self._calls[step]
        if message.len:
            return
        vector.len = size
        if _recvmmsg(sock.fileno(), argument, 1, _RECEIVE, None) < 0:
            raise last_error()
