"""Moving bytes between pairs of streams, inside the kernel.

Each direction of a connection is ``splice`` from one socket into a pipe and from the pipe into
the other socket, so no byte is copied into this process.  A direction owns a pipe only while it
has bytes in it: ten thousand silent connections need none.

The rules that keep what the two ends would see of each other:

- *Back-pressure.*  While a pipe has bytes in it nothing is read from its source.
- *Half-close.*  The end of one direction is passed on with ``shutdown(SHUT_WR)``; the other
  direction goes on.
- *Nobody reads any more.*  A sink that takes no more is answered by ``shutdown(SHUT_RD)`` on the
  source, which a unix or vSockets sender notices.
- *Reset.*  What TCP calls a reset is passed on as one to a TCP socket.  A unix or vSockets
  stream says "reset" when its owner closed it with bytes unread; what it had sent before still
  counts, so that is passed on as an end.

The pump is told of ready descriptors by a :class:`Poller`: a device's loop is one, and so is the
forwarder's.

A socket that cannot refuse passed descriptors (:mod:`.passing`) is read by ``recv``: ``splice``
would close them in this thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Protocol

from ._linux.descriptor_passing import is_guarded
from .limits import SPLICE_PIPE_BYTES, SPLICE_SPARE_PIPES_MAX, SPLICE_TURN_MAX_BYTES

_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
_IN, _OUT, _HUNG_UP = select.EPOLLIN, select.EPOLLOUT, select.EPOLLHUP
#: Nothing is wanted.  Edge-triggered, because the kernel tells of hang-ups whether wanted or not,
#: and once is enough.
_NOTHING = select.EPOLLET
_WRITABLE = _OUT | _HUNG_UP | select.EPOLLERR
_READABLE = _IN | _HUNG_UP | select.EPOLLERR
#: Who sends less at a time than this, in bytes, is not likely to have sent more already.
_SMALL = 4096

_DISCARD = _COPIED = 65_536  #: bytes at a time

_RESET_AT_CLOSE = struct.pack("ii", 1, 0)

_TCP = (socket.AF_INET, socket.AF_INET6)


class Poller(Protocol):
    """Tells of descriptors that are ready: as epoll(7) does, whose events these are."""

    def watch_for(self, fd: int, callback: Callable[[int], None], events: int) -> None:
        """Call ``callback(events)`` whenever ``fd`` is ready for one of ``events``, or hung up."""

    def change(self, fd: int, events: int) -> None:
        """Watch for other events."""

    def unwatch(self, fd: int) -> None:
        """Stop watching; ``fd`` is closed next.  Harmless when it was not watched."""


class _Pipe:
    __slots__ = ("reader", "size", "writer")

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self.size = _grow(self.writer)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


def _grow(pipe: int) -> int:
    try:
        return fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, SPLICE_PIPE_BYTES)
    except PermissionError:  # this user has a lot of pipes already (pipe-user-pages-soft)
        return fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)


def _copy(direction: _Direction, pipe: _Pipe) -> int:
    """As splice from the source into an empty pipe, through this process."""
    data = direction.source.sock.recv(min(pipe.size, _COPIED))
    if data:
        if direction.tap is not None:
            direction.tap(data)
        os.write(pipe.writer, data)
    return len(data)


class _End:
    """One of the two sockets of a connection."""

    __slots__ = ("connection", "fd", "mask", "receiving", "sending", "sock")

    def __init__(self, connection: SplicedPair, sock: socket.socket) -> None:
        self.connection = connection
        self.sock = sock
        self.fd = sock.fileno()
        self.mask = _IN
        self.receiving: _Direction  # the direction that reads from it
        self.sending: _Direction  # the direction that writes to it


class _Direction:
    """Bytes on their way from one end to the other."""

    __slots__ = ("copied", "done", "moved", "pending", "pipe", "sink", "source", "tap")

    def __init__(self, source: _End, sink: _End) -> None:
        self.source = source
        self.sink = sink
        self.pipe: _Pipe | None = None
        self.pending = 0  #: bytes in the pipe
        self.done = False  #: the source has ended and the sink knows, or the sink takes no more
        self.moved = 0  #: bytes the sink has taken
        self.tap: Callable[[bytes], None] | None = None  #: sees what passes, and b"" for the end
        self.copied = is_guarded(source.sock)  #: splice would close passed descriptors here


class SplicedPair:
    """Two joined streams, which are the pump's; see :meth:`SplicePump.start`."""

    def __init__(self, pump: SplicePump, one: socket.socket, other: socket.socket) -> None:
        self.last_moved = monotonic()
        self._pump = pump
        first, second = _End(self, one), _End(self, other)
        self.ends = (first, second)
        self.there = _Direction(first, second)
        self.back = _Direction(second, first)
        first.receiving = second.sending = self.there
        first.sending = second.receiving = self.back

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes that the second socket has taken, and bytes that the first has."""
        return self.there.moved, self.back.moved

    def close(self) -> None:
        """End both streams.  Harmless when they have ended."""
        self._pump.end(self)

    def finished(self, why: OSError | None) -> None:
        """Called once, when both streams have ended; ``why`` unless they did so by themselves."""


class SplicePump:
    """Serves any number of connections."""

    def __init__(self, poller: Poller) -> None:
        self.connections: set[SplicedPair] = set()
        self._poller = poller
        self._pipes: list[_Pipe] = []

    def start(
        self,
        connection: SplicedPair,
        said: bytes = b"",
        tap: Callable[[bool, bytes], None] | None = None,
    ) -> None:
        """Join the two stream sockets of ``connection``.

        ``said`` is what was read from the first already and is for the other: at most 64 KiB.

        With ``tap`` the bytes are copied through this process, and shown to it: whether they go
        from the first to the other, and no bytes for the end of that direction.
        """
        self.connections.add(connection)
        if tap is not None:
            connection.there.tap = partial(tap, True)
            connection.back.tap = partial(tap, False)
            connection.there.copied = connection.back.copied = True
        try:
            if said:
                if tap is not None:
                    tap(True, said)
                pipe = self._take_pipe(connection.there)
                connection.there.pending = os.write(pipe.writer, said)
            for end in connection.ends:
                end.sock.setblocking(False)
                self._poller.watch_for(end.fd, partial(self._ready, end), end.mask)
            for end in connection.ends:
                self._watch(end)
        except OSError as error:
            self.end(connection, error)

    def close(self) -> None:
        """End all connections."""
        for connection in list(self.connections):
            self.end(connection)
        for pipe in self._pipes:
            pipe.close()
        self._pipes.clear()

    def end(self, connection: SplicedPair, why: OSError | None = None, reset: bool = False) -> None:
        """End both streams of ``connection``, with ``reset`` as TCP does that."""
        if connection not in self.connections:
            return
        self.connections.remove(connection)
        for direction in (connection.there, connection.back):
            if not direction.done:
                self._close_direction(direction)
        for end in connection.ends:
            self._poller.unwatch(end.fd)
            if reset and end.sock.family in _TCP:
                with contextlib.suppress(OSError):
                    end.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
            end.sock.close()
        connection.finished(why)

    # Events

    def _ready(self, end: _End, events: int) -> None:
        receiving, sending = end.receiving, end.sending
        if events & _WRITABLE and sending.pending:
            self._move(sending)
        if events & _READABLE and not (receiving.pending or receiving.done):
            self._move(receiving)
        if events & _HUNG_UP and not sending.done:
            self._no_more(sending)

    def _move(self, direction: _Direction) -> None:
        """Move what can be moved now, within one turn's share."""
        source, sink = direction.source, direction.sink
        try:
            pipe = direction.pipe or self._take_pipe(direction)
        except OSError as error:  # no descriptor for one
            self.end(source.connection, error, reset=True)
            return
        size = pending = direction.pending
        budget = SPLICE_TURN_MAX_BYTES
        try:
            while True:
                if pending:
                    size = os.splice(pipe.reader, sink.fd, pending, flags=_FLAGS)
                    direction.moved += size
                    direction.pending = pending = pending - size
                    if pending:
                        continue
                    budget -= size
                    if size < _SMALL or budget <= 0:
                        break  # epoll will say so if there is more
                if direction.copied:
                    size = _copy(direction, pipe)
                else:
                    size = os.splice(source.fd, pipe.writer, pipe.size, flags=_FLAGS)
                if not size:
                    self._finish(direction)
                    return
                direction.pending = pending = size
        except BlockingIOError:
            pass
        except OSError as error:
            self._failed(direction, error)
            return
        source.connection.last_moved = monotonic()
        if not pending:
            self._give_pipe_back(direction)
        # Either the sink is waited for, or the source.
        if bool(pending) != bool(sink.mask & _OUT):
            self._watch(source)
            self._watch(sink)

    def _failed(self, direction: _Direction, error: OSError) -> None:
        writing = direction.pending > 0
        if writing and error.errno == errno.EPIPE:
            self._no_more(direction)
        elif writing or direction.source.sock.family in _TCP:
            self.end(direction.source.connection, error, reset=True)
        else:
            self._finish(direction)
            if not direction.source.sending.done:
                self._no_more(direction.source.sending)

    def _finish(self, direction: _Direction) -> None:
        """The source has ended, and the sink has it all: tell it."""
        with contextlib.suppress(OSError):  # it may have gone
            direction.sink.sock.shutdown(socket.SHUT_WR)
        self._end_direction(direction)

    def _no_more(self, direction: _Direction) -> None:
        """The sink takes no more: what is on its way is lost, and the source is told."""
        sock = direction.source.sock
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RD)
            # A sender that polls for room does not wake up before there is some.
            while sock.family not in _TCP and sock.recv(_DISCARD):
                pass
        self._end_direction(direction)

    def _end_direction(self, direction: _Direction) -> None:
        self._close_direction(direction)
        connection = direction.source.connection
        if connection.there.done and connection.back.done:
            self.end(connection)
        else:
            self._watch(direction.source)
            self._watch(direction.sink)

    def _close_direction(self, direction: _Direction) -> None:
        direction.done = True
        self._give_pipe_back(direction)
        if direction.tap is not None:
            direction.tap(b"")

    def _watch(self, end: _End) -> None:
        """Ask for what is wanted of ``end`` now."""
        reading = not (end.receiving.pending or end.receiving.done)
        mask = (_IN if reading else 0) | (_OUT if end.sending.pending else 0) or _NOTHING
        if end.mask != mask:
            end.mask = mask
            self._poller.change(end.fd, mask)

    # Pipes

    def _take_pipe(self, direction: _Direction) -> _Pipe:
        direction.pipe = self._pipes.pop() if self._pipes else _Pipe()
        return direction.pipe

    def _give_pipe_back(self, direction: _Direction) -> None:
        pipe, direction.pipe = direction.pipe, None
        if pipe is None:
            return
        if direction.pending or len(self._pipes) >= SPLICE_SPARE_PIPES_MAX:
            pipe.close()
        else:
            self._pipes.append(pipe)
        direction.pending = 0
