"""Transfer of bytes between pairs of streams, inside the kernel.

Each direction of a connection is a ``splice`` from one socket into a pipe and a second one from
the pipe into the other socket, so that no byte is copied into this process.  A direction has a
pipe only while the pipe holds bytes: ten thousand idle connections need none.

Rules that preserve what the two ends would see of each other:

- *Back-pressure.*  While a pipe holds bytes, nothing is read from its source.
- *Half-close.*  The end of one direction is passed on with ``shutdown(SHUT_WR)``; the other
  direction stays open.
- *Closed sink.*  When the sink accepts no further bytes, the source gets ``shutdown(SHUT_RD)``,
  which a unix or vSockets sender notices.
- *Reset.*  A reset of a TCP stream is passed on to a TCP socket as a reset.  A unix or vSockets
  stream reports "reset" when its owner closed it with bytes unread; the bytes that it had sent
  before are valid, so this is passed on as an end of stream.

The pump gets events from a :class:`Poller`, which is the device's or the forwarder's loop.

A socket that cannot refuse passed descriptors (:mod:`._linux.descriptor_passing`) is read with
``recv``: ``splice`` would close passed descriptors in this thread.
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
#: No events.  Edge-triggered, because the kernel reports hang-ups in any case, and one report is
#: enough.
_NOTHING = select.EPOLLET
_WRITABLE = _OUT | _HUNG_UP | select.EPOLLERR
_READABLE = _IN | _HUNG_UP | select.EPOLLERR
#: After a transfer of fewer bytes than this, the sender has probably not sent more yet.
_SMALL = 4096

_DISCARD = _COPIED = 65_536  #: bytes at a time

_RESET_AT_CLOSE = struct.pack("ii", 1, 0)

_TCP = (socket.AF_INET, socket.AF_INET6)


class Poller(Protocol):
    """The interface of an event loop with the events of epoll(7)."""

    def watch_for(self, fd: int, callback: Callable[[int], None], events: int) -> None:
        """Call ``callback(events)`` whenever ``fd`` is ready for one of ``events`` or hung up."""

    def change(self, fd: int, events: int) -> None:
        """Replace the events that ``fd`` is watched for."""

    def unwatch(self, fd: int) -> None:
        """Stop watching ``fd``, which the caller closes next; no effect if it is not watched."""


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
    except PermissionError:  # the user's limit is reached (pipe-user-pages-soft)
        return fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)


def _copy(direction: _Direction, pipe: _Pipe) -> int:
    """Copy bytes from the source into the empty ``pipe`` with ``recv``, instead of ``splice``."""
    data = direction.source.sock.recv(min(pipe.size, _COPIED))
    if data:
        if direction.capture is not None:
            direction.capture(data)
        os.write(pipe.writer, data)
    return len(data)


class _End:
    """One end of a connection: its socket, and the directions that read and write it."""

    __slots__ = ("connection", "fd", "mask", "receiving", "sending", "sock")

    def __init__(self, connection: SplicedPair, sock: socket.socket) -> None:
        self.connection = connection
        self.sock = sock
        self.fd = sock.fileno()
        self.mask = _IN
        self.receiving: _Direction  # the direction that reads from this end
        self.sending: _Direction  # the direction that writes to this end


class _Direction:
    """The transfer from one end to the other."""

    __slots__ = ("capture", "copied", "done", "moved", "pending", "pipe", "sink", "source")

    def __init__(self, source: _End, sink: _End) -> None:
        self.source = source
        self.sink = sink
        self.pipe: _Pipe | None = None
        self.pending = 0  #: bytes in the pipe
        self.done = False  #: the end of stream was passed on, or the sink is closed
        self.moved = 0  #: bytes that the sink has accepted
        #: called with the bytes, and with b"" for the end
        self.capture: Callable[[bytes], None] | None = None
        self.copied = is_guarded(source.sock)  #: by recv instead of splice


class SplicedPair:
    """Two joined streams, whose sockets the pump owns; see :meth:`SplicePump.start`."""

    def __init__(self, pump: SplicePump, one: socket.socket, other: socket.socket) -> None:
        self.last_moved = monotonic()
        self._pump = pump
        first, second = _End(self, one), _End(self, other)
        self.ends = (first, second)
        self.forward = _Direction(first, second)
        self.reverse = _Direction(second, first)
        first.receiving = second.sending = self.forward
        first.sending = second.receiving = self.reverse

    @property
    def moved(self) -> tuple[int, int]:
        """The number of bytes that the second socket has accepted, and that of the first."""
        return self.forward.moved, self.reverse.moved

    def close(self) -> None:
        """Close both streams; no effect if they have ended."""
        self._pump.end(self)

    def finished(self, why: OSError | None) -> None:
        """Handle the end of both streams; ``why`` is the error that ended them, or None.

        Called once for each pair; subclasses implement it.
        """


class SplicePump:
    """A mover of bytes for any number of connections, driven by the events of ``poller``."""

    def __init__(self, poller: Poller) -> None:
        self.connections: set[SplicedPair] = set()
        self._poller = poller
        self._pipes: list[_Pipe] = []

    def start(
        self,
        connection: SplicedPair,
        early: bytes = b"",
        capture: Callable[[bool, bytes], None] | None = None,
    ) -> None:
        """Join the two stream sockets of ``connection``.

        ``early`` are bytes already read from the first socket and meant for the second: at most
        64 KiB.

        ``capture`` is called with the bytes of both directions, and with b"" at the end of each;
        its first argument is True for the direction from the first socket to the second.  The
        bytes are then copied through this process.
        """
        self.connections.add(connection)
        if capture is not None:
            connection.forward.capture = partial(capture, True)
            connection.reverse.capture = partial(capture, False)
            connection.forward.copied = connection.reverse.copied = True
        try:
            if early:
                if capture is not None:
                    capture(True, early)
                pipe = self._take_pipe(connection.forward)
                connection.forward.pending = os.write(pipe.writer, early)
            for end in connection.ends:
                end.sock.setblocking(False)
                self._poller.watch_for(end.fd, partial(self._ready, end), end.mask)
            for end in connection.ends:
                self._watch(end)
        except OSError as error:
            self.end(connection, error)

    def close(self) -> None:
        """Close all connections."""
        for connection in list(self.connections):
            self.end(connection)
        for pipe in self._pipes:
            pipe.close()
        self._pipes.clear()

    def end(self, connection: SplicedPair, why: OSError | None = None, reset: bool = False) -> None:
        """Close both streams of ``connection``; with ``reset``, TCP sockets are reset."""
        if connection not in self.connections:
            return
        self.connections.remove(connection)
        for direction in (connection.forward, connection.reverse):
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
            self._stop_source(sending)

    def _move(self, direction: _Direction) -> None:  # noqa: C901 - hot loop
        """Transfer the available bytes of one direction, at most SPLICE_TURN_MAX_BYTES."""
        source, sink = direction.source, direction.sink
        try:
            pipe = direction.pipe or self._take_pipe(direction)
        except OSError as error:  # no descriptors for a pipe
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
                        break  # epoll reports further bytes
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
            self._release_pipe(direction)
        # Wait for either the sink or the source.
        if bool(pending) != bool(sink.mask & _OUT):
            self._watch(source)
            self._watch(sink)

    def _failed(self, direction: _Direction, error: OSError) -> None:
        writing = direction.pending > 0
        if writing and error.errno == errno.EPIPE:
            self._stop_source(direction)
        elif writing or direction.source.sock.family in _TCP:
            self.end(direction.source.connection, error, reset=True)
        else:
            self._finish(direction)
            if not direction.source.sending.done:
                self._stop_source(direction.source.sending)

    def _finish(self, direction: _Direction) -> None:
        """Pass on the end of stream to the sink, which has accepted all bytes."""
        with contextlib.suppress(OSError):  # it may be closed
            direction.sink.sock.shutdown(socket.SHUT_WR)
        self._end_direction(direction)

    def _stop_source(self, direction: _Direction) -> None:
        """Discard the bytes in transfer because the sink is closed, and stop the source."""
        sock = direction.source.sock
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RD)
            # A sender that polls for room is woken only once there is some.
            while sock.family not in _TCP and sock.recv(_DISCARD):
                pass
        self._end_direction(direction)

    def _end_direction(self, direction: _Direction) -> None:
        self._close_direction(direction)
        connection = direction.source.connection
        if connection.forward.done and connection.reverse.done:
            self.end(connection)
        else:
            self._watch(direction.source)
            self._watch(direction.sink)

    def _close_direction(self, direction: _Direction) -> None:
        direction.done = True
        self._release_pipe(direction)
        if direction.capture is not None:
            direction.capture(b"")

    def _watch(self, end: _End) -> None:
        """Watch ``end`` for the events that its two directions wait for."""
        reading = not (end.receiving.pending or end.receiving.done)
        mask = (_IN if reading else 0) | (_OUT if end.sending.pending else 0) or _NOTHING
        if end.mask != mask:
            end.mask = mask
            self._poller.change(end.fd, mask)

    # Pipes

    def _take_pipe(self, direction: _Direction) -> _Pipe:
        direction.pipe = self._pipes.pop() if self._pipes else _Pipe()
        return direction.pipe

    def _release_pipe(self, direction: _Direction) -> None:
        pipe, direction.pipe = direction.pipe, None
        if pipe is None:
            return
        if direction.pending or len(self._pipes) >= SPLICE_SPARE_PIPES_MAX:
            pipe.close()
        else:
            self._pipes.append(pipe)
        direction.pending = 0
