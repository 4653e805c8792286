"""A relay of datagrams between a socket and standard input and output.

One read of standard input is one datagram: a line from a terminal, up to MAX_DATAGRAM bytes
from a file.  Datagrams have no end: a timeout or the user ends the relay.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import time
from collections.abc import Callable

from ..attachment import ContextHandle
from ..eventloop.rebind import lifeline
from ..limits import MAX_DATAGRAM, RETRY_LONGEST_PAUSE_SECONDS
from ..model.constants import VMADDR_CID_LOCAL
from ..socket import socket
from .connect import keep_trying
from .errors import SEND, CliError, cli_error
from .output import notice
from .relay import STDIN, STDOUT, write_all

Address = tuple[int, int]


class DatagramRelay:
    """A relay between standard input and output and one datagram socket, made by ``bind``.

    ``bind`` is called again with the last socket's address after a restart of vsockd.  With
    ``peer``, datagrams of other sources are dropped; without, the peer is the source of the last
    datagram.  ``idle`` is the longest silence and ``quit_after`` the time after the end of
    standard input until the relay ends, ``wait`` the time to retry while the peer does not
    exist (None: no limit); all are in seconds.
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
        """Return ``address`` with this context's own CID in place of VMADDR_CID_LOCAL."""
        cid, port = address
        return (self._context.cid if cid == VMADDR_CID_LOCAL else cid), port
