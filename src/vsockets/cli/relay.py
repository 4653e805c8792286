"""Carrying streams between sockets and standard input and output.

What is read from standard input goes to every peer, what any peer sends goes to standard
output.  The end of standard input half-closes the streams; what the peers still have to say is
received to its end.  One thread waits for everything: the descriptor that cannot take data is
the only one that holds up what feeds it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket as stdlib
import time
from collections.abc import Callable

from .._linux.descriptor_passing import guard_accepted
from ..socket import socket
from .errors import CliError
from .output import notice

STDIN, STDOUT = 0, 1

#: Bytes moved at a time; a pipe and a vSockets stream hold 64 KiB unless told otherwise.
CHUNK = 65_536

_ENDED = select.POLLHUP | select.POLLERR
_READABLE = select.POLLIN | _ENDED


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write everything; raises BrokenPipeError when nobody reads any more."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class Peer:
    """One stream, and what has to be done on it."""

    __slots__ = ("half_closed_at", "last_moved", "pending", "receiving", "sock", "trouble")

    def __init__(self, sock: socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.pending = memoryview(b"")  #: read from standard input, and not yet sent
        self.receiving = True
        self.half_closed_at: float | None = None
        self.last_moved = time.monotonic()
        self.trouble = ""  #: what to tell the user when the stream has ended

    def send_pending(self) -> None:
        """Send what can be sent now."""
        try:
            self.pending = self.pending[self.sock.send(self.pending) :]
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):
            # It takes no more, but what it sent before is still to be received.
            self.trouble = f"the peer closed the stream: {len(self.pending)} bytes were not sent"
            self.pending = memoryview(b"")
            self.half_close()
        self.last_moved = time.monotonic()

    def half_close(self) -> None:
        """Tell the peer that this was all."""
        self.half_closed_at = time.monotonic()
        with contextlib.suppress(OSError):  # it may have gone
            self.sock.shutdown(stdlib.SHUT_WR)


class StreamRelay:
    """Standard input and output, and the streams joined to them.

    ``idle`` is how long a stream may be silent in both directions, ``quit_after`` how long it
    may go on after it was half-closed; both in seconds.  New streams come from ``listener``,
    through ``accept``; then one that fails is no failure of the whole.
    """

    def __init__(
        self,
        *,
        read_stdin: bool = True,
        idle: float | None = None,
        quit_after: float | None = None,
        listener: socket | None = None,
        accept: Callable[[], socket] | None = None,
    ) -> None:
        self._interactive = read_stdin
        self._stdin_open = read_stdin
        self._idle = idle
        self._quit_after = quit_after
        self._listener = listener
        self._accept = accept
        self._peers: dict[int, Peer] = {}
        self._poll = select.poll()
        self._watched: dict[int, int] = {}
        self._buffer = memoryview(bytearray(CHUNK * 4))

    def add(self, sock: socket) -> None:
        """Join a stream that stands; it is closed when it is done."""
        peer = Peer(guard_accepted(sock))
        self._peers[sock.fileno()] = peer
        if self._interactive and not self._stdin_open:
            peer.half_close()

    def run(self) -> None:
        """Carry data until every stream has ended; with a listener, for ever.

        Raises CliError when data was lost or a stream was silent for too long, BrokenPipeError
        when standard output is closed.
        """
        while self._peers or self._listener is not None:
            self._watch_what_matters()
            for fd, events in self._poll.poll(self._patience()):
                if fd in self._peers:
                    self._serve(self._peers[fd], events)
                elif self._listener is not None and fd == self._listener.fileno():
                    assert self._accept is not None
                    self.add(self._accept())
                elif fd == STDIN:
                    self._read_stdin()
            self._end_overdue()

    # Waiting

    def _watch_what_matters(self) -> None:
        wanted = {fd: self._events_of(peer) for fd, peer in self._peers.items()}
        if self._listener is not None:
            wanted[self._listener.fileno()] = select.POLLIN
        sending = [peer for peer in self._peers.values() if peer.half_closed_at is None]
        # Read no more than all of them can take.
        if self._stdin_open and sending and not any(peer.pending for peer in sending):
            wanted[STDIN] = select.POLLIN
        for fd in self._watched.keys() - wanted.keys():
            self._poll.unregister(fd)
        for fd, events in wanted.items():
            if self._watched.get(fd) != events:
                self._poll.register(fd, events)
        self._watched = wanted

    @staticmethod
    def _events_of(peer: Peer) -> int:
        return (select.POLLIN if peer.receiving else 0) | (select.POLLOUT if peer.pending else 0)

    def _patience(self) -> float | None:
        """How long poll() may take, in milliseconds."""
        deadlines = [when for peer in self._peers.values() for when in self._deadlines(peer)]
        if not deadlines:
            return None
        return max(0.0, min(deadlines) - time.monotonic()) * 1000 + 1

    def _deadlines(self, peer: Peer) -> list[float]:
        deadlines = []
        if self._idle is not None:
            deadlines.append(peer.last_moved + self._idle)
        if self._quit_after is not None and peer.half_closed_at is not None:
            deadlines.append(peer.half_closed_at + self._quit_after)
        return deadlines

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for peer in list(self._peers.values()):
            if self._idle is not None and now >= peer.last_moved + self._idle:
                self._end(peer, f"nothing came or went for {self._idle:g} s")
            elif any(now >= when for when in self._deadlines(peer)):
                self._end(peer)

    # Moving

    def _serve(self, peer: Peer, events: int) -> None:
        if peer.receiving and events & _READABLE:
            self._receive(peer)
        if peer.pending and events & (select.POLLOUT | _ENDED):
            peer.send_pending()
        no_more_to_send = not self._stdin_open and not peer.pending
        if no_more_to_send and self._interactive and peer.half_closed_at is None:
            peer.half_close()
        # POLLHUP: the other side neither sends nor receives any more.
        if not peer.receiving and (no_more_to_send or peer.half_closed_at or events & _ENDED):
            self._end(peer, peer.trouble)

    def _receive(self, peer: Peer) -> None:
        try:
            size = peer.sock.recv_into(self._buffer)
        except BlockingIOError:
            return
        except ConnectionResetError as error:
            peer.trouble = f"the peer closed the stream before it read it all ({error.strerror})"
            peer.receiving = False
            return
        if size == 0:
            peer.receiving = False
            return
        peer.last_moved = time.monotonic()
        write_all(STDOUT, self._buffer[:size])

    def _read_stdin(self) -> None:
        try:
            data = os.read(STDIN, CHUNK)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EBADF):  # no terminal, or closed from the start
                raise
            data = b""
        self._stdin_open = bool(data)
        for peer in list(self._peers.values()):
            if peer.half_closed_at is None:
                peer.pending = memoryview(data)
                self._serve(peer, select.POLLOUT)

    def _end(self, peer: Peer, why: str = "") -> None:
        fd = peer.sock.fileno()
        del self._peers[fd]
        if self._watched.pop(fd, None) is not None:
            self._poll.unregister(fd)
        peer.sock.close()
        if why and self._listener is None:
            raise CliError(why)
        if why:
            notice(why)
