"""Carrying datagrams between a socket and standard input and output.

One read of standard input is one datagram: a line from a terminal, up to MAX_DATAGRAM bytes
from a file.  Datagrams have no end, so it is time, or the user, that ends the conversation.
"""

from __future__ import annotations

import errno
import os
import select
import time

from ..constants import VMADDR_CID_LOCAL
from ..limits import MAX_DATAGRAM
from ..socket import socket
from .advice import SEND, failure
from .output import notice
from .reach import keep_trying
from .relay import STDIN, STDOUT, write_all

Address = tuple[int, int]


class DatagramRelay:
    """Standard input and output, and one datagram socket.

    ``peer`` is whom to talk with, and nobody else is heard; without one it is whoever sent the
    last datagram.  ``idle`` and ``quit_after`` are in seconds: how long there may be silence,
    and how long to go on after the end of standard input.  ``wait`` is how long to try to reach
    a peer that is not there yet, in seconds, None for ever.
    """

    def __init__(
        self,
        sock: socket,
        own_cid: int,
        peer: Address | None = None,
        *,
        read_stdin: bool = True,
        idle: float | None = None,
        quit_after: float | None = None,
        wait: float | None = 0.0,
        verbose: bool = False,
    ) -> None:
        self._sock = sock
        self._own_cid = own_cid
        self._peer = peer
        self._only = None if peer is None else self._globally(peer)
        self._stdin_open = read_stdin
        self._idle = idle
        self._quit_after = quit_after
        self._wait = wait
        self._verbose = verbose
        self._last_moved = time.monotonic()
        self._stdin_ended_at: float | None = None
        self.received = 0  #: datagrams

    def run(self) -> None:
        """Carry datagrams until the time has passed.  Raises Failure when sending fails."""
        while (patience := self._patience()) is None or patience > 0:
            poll = select.poll()
            poll.register(self._sock, select.POLLIN)
            if self._stdin_open and self._peer is not None:
                poll.register(STDIN, select.POLLIN)
            for fd, _ in poll.poll(None if patience is None else patience * 1000 + 1):
                if fd == self._sock.fileno():
                    self._receive()
                else:
                    self._read_stdin()

    def _patience(self) -> float | None:
        deadlines = []
        if self._idle is not None:
            deadlines.append(self._last_moved + self._idle)
        if self._quit_after is not None and self._stdin_ended_at is not None:
            deadlines.append(self._stdin_ended_at + self._quit_after)
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _receive(self) -> None:
        data, source = self._sock.recvfrom(MAX_DATAGRAM)
        if self._only is not None and self._globally(source) != self._only:
            return
        if self._verbose:
            notice("{} bytes from {}:{}".format(len(data), *source))
        self.received += 1
        if self._only is None:
            self._peer = source
        self._last_moved = time.monotonic()
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
            raise failure("send to {}:{}".format(*peer), error, SEND) from None
        self._last_moved = time.monotonic()

    def _globally(self, address: Address) -> Address:
        """An address of our own context has two spellings; this is the one others use."""
        cid, port = address
        return (self._own_cid if cid == VMADDR_CID_LOCAL else cid), port
