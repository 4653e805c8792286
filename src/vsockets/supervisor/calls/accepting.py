"""accept() and accept4(): vsockd announces a connection, and the program gets its stream."""

from __future__ import annotations

import _socket
import errno
import os
import select
from contextlib import closing
from socket import AF_UNIX, SO_RCVTIMEO, SOCK_CLOEXEC, SOCK_NONBLOCK

from ..._linux.sockets import timeout_of
from ...protocol import Record
from ...socket import Phase
from ..call import Answer, Call, failure
from ..interception import CallInterrupted
from ..scheduler import lent
from ..sockets import Endpoint
from ..vsockd_client import blocking_briefly, receive_record, take_record
from .connecting import establish

_FLAGS = int(SOCK_CLOEXEC | SOCK_NONBLOCK)


async def accept(call: Call, endpoint: Endpoint) -> Answer:
    """Serve accept(): accept4() without flags."""
    return await _accept(call, endpoint, 0)


async def accept4(call: Call, endpoint: Endpoint) -> Answer:
    """Serve accept4(): wait for a connection, unless the socket is non-blocking."""
    return await _accept(call, endpoint, call.integer(3))


async def _accept(call: Call, endpoint: Endpoint, flags: int) -> Answer:
    if flags & ~_FLAGS:
        raise failure(errno.EINVAL)
    if endpoint.is_datagram:
        raise failure(errno.EOPNOTSUPP)
    address, size_at = call.arguments[1:3]
    if address:
        call.read(size_at, 4)  # fail with EFAULT before a connection is taken
    while True:
        _require_listening(endpoint)
        with closing(call.duplicate(endpoint)) as listener:
            taken = await _take(endpoint, listener)
            if taken is not None:
                break
            if not os.get_blocking(listener.fileno()):
                raise failure(errno.EAGAIN)
            seconds = _timeout(listener)
            wait = lent(listener.detach(), endpoint.inode, seconds)
        if not await wait:
            raise failure(errno.EAGAIN)
    fd, record = taken
    sock = _socket.socket(AF_UNIX, endpoint.type, 0, fd)
    with closing(sock):
        accepted = call.services.sockets.adopt(sock, endpoint.type)
        establish(accepted, sock, record)
        os.set_blocking(fd, not flags & SOCK_NONBLOCK)
        try:
            # Before the descriptor: with it, another thread may use the memory for something else.
            call.write(*call.address_pieces(record.peer, address, size_at))
            call.answer_with_socket(sock, accepted, flags)
        except CallInterrupted:
            endpoint.accepted.append((sock.detach(), record))
            raise
    return None


def _require_listening(endpoint: Endpoint) -> None:
    if endpoint.phase is Phase.LOST:
        raise failure(errno.ENETDOWN)
    if endpoint.phase is not Phase.LISTENING:
        raise failure(errno.EINVAL)


async def _take(endpoint: Endpoint, listener: _socket.socket) -> tuple[int, Record] | None:
    """Return the descriptor and the record of the next connection, or None.

    Raises OSError; CallInterrupted.
    """
    if endpoint.accepted:
        return endpoint.accepted.popleft()
    if not endpoint.has_name:
        try:
            record, fd = take_record(listener)
        except BlockingIOError:
            return None
    else:
        while True:
            token = endpoint.arriving.popleft() if endpoint.arriving else _accept_token(listener)
            if token is None:
                return None
            try:
                record, fd = await receive_record(token)  # vsockd sends it at once
            except CallInterrupted:
                endpoint.arriving.append(token)
                raise
            except OSError:  # vsockd has ended: try the next
                token.close()
            else:
                token.close()
                break
    if fd is None:
        raise failure(errno.EMFILE, "connection lost: the supervisor has no free descriptor")
    return fd, record


def _accept_token(listener: _socket.socket) -> _socket.socket | None:
    """Return the next of vsockd's connections to the socket, or None."""
    if os.get_blocking(listener.fileno()):
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        if not poll.poll(0):
            return None
    try:
        # A process outside supervision may share the listener, and accept first.
        with blocking_briefly(listener, SO_RCVTIMEO):
            fd, _ = listener._accept()  # type: ignore[attr-defined]  # as socket.accept()
    except (BlockingIOError, ConnectionAbortedError):
        return None
    return _socket.socket(AF_UNIX, listener.type, 0, fd)


def _timeout(listener: _socket.socket) -> float | None:
    """Return SO_RCVTIMEO in seconds, or None for no limit."""
    return timeout_of(listener, SO_RCVTIMEO) or None
