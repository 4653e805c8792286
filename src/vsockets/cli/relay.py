"""Relays between sockets and standard input and output.

*Streams.*  Data from standard input goes to every peer, and data from any peer to standard output.
The end of standard input half-closes the streams; data of the peers is received to its end.  One
thread polls all descriptors: one that cannot take data blocks nothing but its own source.

*Datagrams.*  One read of standard input is one datagram: a line from a terminal, up to MAX_DATAGRAM
bytes from a file.  Datagrams have no end: a timeout or the user ends the relay.
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
from ..attachment import ContextHandle
from ..eventloop.rebind import lifeline
from ..limits import MAX_DATAGRAM, RETRY_LONGEST_PAUSE_SECONDS
from ..model.constants import VMADDR_CID_LOCAL
from ..socket import socket
from .connect import keep_trying
from .errors import SEND, CliError, cli_error
from .output import notice

Address = tuple[int, int]

STDIN, STDOUT = 0, 1

#: Bytes relayed at a time: the default capacity of a pipe and of a vSockets stream.
CHUNK = 65_536

_ENDED = select.POLLHUP | select.POLLERR
_READABLE = select.POLLIN | _ENDED


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of ``data``.

    Raises BrokenPipeError if the reader has closed the descriptor.
    """
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class Peer:
    """One stream and the state of its relay."""

    __slots__ = ("half_closed_at", "last_active", "pending", "problem", "receiving", "sock")

    def __init__(self, sock: socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.pending = memoryview(b"")  #: data from standard input that is not sent yet
        self.receiving = True
        self.half_closed_at: float | None = None
        self.last_active = time.monotonic()
        self.problem = ""  #: problem to report when the stream has ended

    def send_pending(self) -> None:
        """Send as much of ``pending`` as the socket takes now."""
        try:
            self.pending = self.pending[self.sock.send(self.pending) :]
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):
            # The peer has closed; data that it sent before is still received.
            self.problem = f"the peer closed the stream: {len(self.pending)} bytes were not sent"
            self.pending = memoryview(b"")
            self.half_close()
        self.last_active = time.monotonic()

    def half_close(self) -> None:
        """Shut down the sending side."""
        self.half_closed_at = time.monotonic()
        with contextlib.suppress(OSError):  # the peer may have closed
            self.sock.shutdown(stdlib.SHUT_WR)


class StreamRelay:
    """A relay between standard input and output and any number of streams.

    A stream ends after ``idle`` seconds of silence in both directions, and ``quit_after`` seconds
    after it was half-closed.  New streams are accepted from ``listener`` by ``accept``; with a
    listener, a stream that fails is logged and does not end the relay.
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
        """Relay an established stream, and close it at its end."""
        peer = Peer(guard_accepted(sock))
        self._peers[sock.fileno()] = peer
        if self._interactive and not self._stdin_open:
            peer.half_close()

    def run(self) -> None:
        """Relay until every stream has ended; with a listener, without an end.

        Raises CliError if data was lost or a stream was silent for too long, BrokenPipeError
        if standard output is closed.
        """
        while self._peers or self._listener is not None:
            self._update_poll()
            for fd, events in self._poll.poll(self._poll_timeout()):
                if fd in self._peers:
                    self._serve(self._peers[fd], events)
                elif self._listener is not None and fd == self._listener.fileno():
                    assert self._accept is not None
                    self.add(self._accept())
                elif fd == STDIN:
                    self._read_stdin()
            self._end_overdue()

    # Waiting

    def _update_poll(self) -> None:
        wanted = {fd: self._events_of(peer) for fd, peer in self._peers.items()}
        if self._listener is not None:
            wanted[self._listener.fileno()] = select.POLLIN
        sending = [peer for peer in self._peers.values() if peer.half_closed_at is None]
        # Read standard input only when every peer can take more.
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

    def _poll_timeout(self) -> float | None:
        """Return the timeout of poll(), in milliseconds."""
        deadlines = [when for peer in self._peers.values() for when in self._deadlines(peer)]
        if not deadlines:
            return None
        return max(0.0, min(deadlines) - time.monotonic()) * 1000 + 1

    def _deadlines(self, peer: Peer) -> list[float]:
        deadlines = []
        if self._idle is not None:
            deadlines.append(peer.last_active + self._idle)
        if self._quit_after is not None and peer.half_closed_at is not None:
            deadlines.append(peer.half_closed_at + self._quit_after)
        return deadlines

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for peer in list(self._peers.values()):
            if self._idle is not None and now >= peer.last_active + self._idle:
                self._end(peer, f"no data was sent or received for {self._idle:g} s")
            elif any(now >= when for when in self._deadlines(peer)):
                self._end(peer)

    # Moving

    def _serve(self, peer: Peer, events: int) -> None:
        if peer.receiving and events & _READABLE:
            self._receive(peer)
        if peer.pending and events & (select.POLLOUT | _ENDED):
            peer.send_pending()
        all_sent = not self._stdin_open and not peer.pending
        if all_sent and self._interactive and peer.half_closed_at is None:
            peer.half_close()
        # POLLHUP: the peer has closed both directions.
        if not peer.receiving and (all_sent or peer.half_closed_at or events & _ENDED):
            self._end(peer, peer.problem)

    def _receive(self, peer: Peer) -> None:
        try:
            size = peer.sock.recv_into(self._buffer)
        except BlockingIOError:
            return
        except ConnectionResetError as error:
            peer.problem = (
                f"the peer closed the stream before it had read all data ({error.strerror})"
            )
            peer.receiving = False
            return
        if size == 0:
            peer.receiving = False
            return
        peer.last_active = time.monotonic()
        write_all(STDOUT, self._buffer[:size])

    def _read_stdin(self) -> None:
        try:
            data = os.read(STDIN, CHUNK)
        except OSError as error:
            if error.errno != errno.EIO:  # a background process of a terminal
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


class DatagramRelay:
    """A relay between standard input and output and one datagram socket, made by ``bind``.

    After a restart of vsockd ``bind`` is called again, with the last socket's address.  With
    ``peer``, datagrams of other sources are dropped; without, the peer is the source of the last
    datagram.

    All times are in seconds.  The relay ends after ``idle`` of silence, and ``quit_after`` after
    the end of standard input.  Sending to a peer that does not exist is retried for ``wait`` (None:
    without a limit).
    """

    def __init__(
        self,
        bind: Callable[[Address], socket],
        address: Address,
        context: ContextHandle,
        peer: Address | None = None,
        *,
        read_stdin: bool = True,
        idle: float | None = None,
        quit_after: float | None = None,
        wait: float | None = 0.0,
        verbose: bool = False,
    ) -> None:
        self._bind = bind
        self._sock = bind(address)
        self._context = context
        self._line = lifeline(context)
        self._peer = peer
        self._expected = None if peer is None else self._globally(peer)
        self._stdin_open = read_stdin
        self._idle = idle
        self._quit_after = quit_after
        self._wait = wait
        self._verbose = verbose
        self._last_active = time.monotonic()
        self._stdin_ended_at: float | None = None
        self.received = 0  #: datagrams

    @property
    def address(self) -> Address:
        """The socket's address."""
        return self._sock.getsockname()

    def run(self) -> None:
        """Relay datagrams until a timeout expires.

        Raises CliError if sending fails.
        """
        while (remaining := self._remaining()) is None or remaining > 0:
            poll = select.poll()
            poll.register(self._sock, select.POLLIN)
            if self._line is not None:
                poll.register(self._line, select.POLLIN)
            if self._stdin_open and self._peer is not None:
                poll.register(STDIN, select.POLLIN)
            ready = dict(poll.poll(None if remaining is None else remaining * 1000 + 1))
            if self._line is not None and self._line.fileno() in ready:
                self._rebind()
                continue
            if self._sock.fileno() in ready:
                self._receive()
            if STDIN in ready:
                self._read_stdin()

    def _rebind(self) -> None:
        """Bind the address again once vsockd has been restarted, within the timeouts."""
        assert self._line is not None
        address = self.address
        notice("vsockd has ended")
        self._line.close()
        self._sock.close()
        while (remaining := self._remaining()) is None or remaining > 0:
            pause = RETRY_LONGEST_PAUSE_SECONDS
            time.sleep(pause if remaining is None else min(remaining, pause))
            with contextlib.suppress(OSError, CliError):
                line = lifeline(self._context)
                try:
                    self._sock = self._bind(address)
                except BaseException:
                    if line is not None:
                        line.close()
                    raise
                self._line = line
                notice("listening again on {}:{}".format(*self.address))
                return

    def _remaining(self) -> float | None:
        deadlines = []
        if self._idle is not None:
            deadlines.append(self._last_active + self._idle)
        if self._quit_after is not None and self._stdin_ended_at is not None:
            deadlines.append(self._stdin_ended_at + self._quit_after)
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _receive(self) -> None:
        try:
            data, source = self._sock.recvfrom(MAX_DATAGRAM)
        except ConnectionResetError:
            return  # vsockd has ended
        if self._expected is not None and self._globally(source) != self._expected:
            return
        if self._verbose:
            notice("{} bytes from {}:{}".format(len(data), *source))
        self.received += 1
        if self._expected is None:
            self._peer = source
        self._last_active = time.monotonic()
        write_all(STDOUT, data)

    def _read_stdin(self) -> None:
        data = os.read(STDIN, MAX_DATAGRAM)
        if not data:
            self._stdin_open = False
            self._stdin_ended_at = time.monotonic()
            return
        peer = self._peer
        assert peer is not None
        try:
            keep_trying(
                lambda: self._sock.sendto(data, peer),
                self._wait,
                {errno.ECONNREFUSED, errno.EHOSTUNREACH},
            )
        except OSError as error:
            raise cli_error("send to {}:{}".format(*peer), error, SEND) from None
        self._last_active = time.monotonic()

    def _globally(self, address: Address) -> Address:
        """Return ``address``, with this context's own CID in place of VMADDR_CID_LOCAL."""
        cid, port = address
        return (self._context.cid if cid == VMADDR_CID_LOCAL else cid), port
