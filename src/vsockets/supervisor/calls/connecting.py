"""Connections: connect(), listen(), accept() and shutdown().

vsockd replies to connect() on the program's own socket, which becomes one end of the stream.  The
supervisor takes the reply before the call returns, even if the program does not wait: vsockd
replies in a tenth of a millisecond.  Only if it does not, the program gets EINPROGRESS before the
reply.  Until then the socket polls as not writable (docs/internals/design.md), and the supervisor
takes the reply when it comes, at the latest at the program's next call on the socket.

vsockd announces each connection to a listening socket by connecting to it, and then sends the
stream's socket, which the program gets from accept().
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import os
import select
import time
from contextlib import closing
from socket import (
    AF_UNIX,
    SHUT_RD,
    SHUT_RDWR,
    SO_RCVTIMEO,
    SO_SNDBUF,
    SOCK_CLOEXEC,
    SOCK_NONBLOCK,
    SOCK_SEQPACKET,
    SOCK_STREAM,
    SOL_SOCKET,
)

from ..._linux.sockets import SO_SNDBUFFORCE, refuse_descriptors, timeout_of
from ...limits import (
    SEND_BUFFER_MAX_BYTES,
    STREAM_BUFFER_DEFAULT_BYTES,
    VSOCKD_REPLY_TIMEOUT_SECONDS,
)
from ...model.constants import VMADDR_CID_ANY
from ...protocol import Record, client
from ...socket import Phase
from ..call import Answer, Call, failure
from ..interception import CallInterrupted
from ..limits import SUPERVISOR_CONNECT_GRACE_SECONDS, SUPERVISOR_FORCED_SEND_BUFFER_MAX_BYTES
from ..scheduler import lent, ready
from ..sockets import Endpoint, pack_address
from ..vsockd_client import SEND, BriefBlocking, Credentials, receive_record, send, take_record
from . import datagrams

#: Bytes that the kernel adds to each message of a packet socket: a message larger than the send
#: buffer less this fails (EMSGSIZE).
_PACKET_OVERHEAD = 32
_ACCEPT_FLAGS = int(SOCK_CLOEXEC | SOCK_NONBLOCK)
#: Phases in which shutdown() fails.
_BEFORE_A_CONNECT = (Phase.NEW, Phase.BOUND, Phase.LISTENING)
#: Phases of a socket whose connect has not failed.
_BEGUN = (Phase.CONNECTING, Phase.CONNECTED)
#: The errors of connect() in phases in which a socket cannot be connected.
_REFUSED = {
    Phase.LISTENING: errno.EINVAL,
    Phase.CONNECTING: errno.EALREADY,
    Phase.CONNECTED: errno.EISCONN,
    Phase.FAILED: errno.EALREADY,
    Phase.LOST: errno.ENETDOWN,
}


async def connect(call: Call, endpoint: Endpoint) -> Answer:  # noqa: C901 - the states of a connect, in order
    """Serve connect(): the errors are those of ``transports.fabric``."""
    if endpoint.is_datagram:
        return await datagrams.connect(call, endpoint)
    # duplicate() proves what was read before it.
    peer = call.read_address_unchecked(call.arguments[1], call.integer(2))
    credentials = call.credentials_unchecked()
    with closing(call.duplicate(endpoint)) as sock:
        take_reply(endpoint, sock)
        if endpoint.interrupted is not None:
            is_repeated = endpoint.interrupted == peer
            if is_repeated and (endpoint.phase in _BEGUN or endpoint.error):
                return await _finish_interrupted(endpoint, sock)
            if endpoint.phase is not Phase.CONNECTING:
                endpoint.interrupted = None
        _require_connectable(endpoint)
        if peer is None:
            raise failure(errno.EINVAL)
        if peer[0] == VMADDR_CID_ANY:
            raise failure(errno.ENODEV)
        polls = not os.get_blocking(sock.fileno())
        deadline = time.monotonic() + endpoint.connect_timeout
        # A program that does not wait cannot learn that connecting has not begun: fail instead.
        seconds = 0 if polls else endpoint.connect_timeout
        while True:
            await _attach(call, endpoint, sock, seconds, not polls)
            _require_connectable(endpoint)  # another thread may have connected the socket meanwhile
            if _send(endpoint, sock, peer, polls, credentials):
                break
        call.services.vsockd.await_briefly(sock)
        take_reply(endpoint, sock)
        if polls:
            if not await _wait(endpoint, sock, SUPERVISOR_CONNECT_GRACE_SECONDS, polls):
                call.answer(-errno.EINPROGRESS)
                await _wait(endpoint, sock, deadline - time.monotonic(), polls)
        else:
            try:
                await _wait(endpoint, sock, endpoint.connect_timeout, polls)
            except CallInterrupted:  # as with TCP, connecting goes on after EINTR
                call.answered = True
                endpoint.interrupted = peer
                await _wait(endpoint, sock, deadline - time.monotonic(), polls)
        if endpoint.phase is Phase.CONNECTING:
            endpoint.fail(errno.ETIMEDOUT, polls)
    if polls and endpoint.error != errno.EADDRNOTAVAIL:
        # The peer's decision is known already, but a non-blocking connect reports it by SO_ERROR.
        return -errno.EINPROGRESS
    if endpoint.interrupted is not None:  # the result is for a repeated connect
        return None
    return _result(endpoint)


async def _finish_interrupted(endpoint: Endpoint, sock: _socket.socket) -> Answer:
    """Return the result of a connect that a signal has interrupted: connect() is called again."""
    await _wait(endpoint, sock, endpoint.connect_timeout, False)
    endpoint.interrupted = None
    return _result(endpoint)


def _result(endpoint: Endpoint) -> int:
    code, endpoint.error = endpoint.error, 0
    if code:
        endpoint.fail(0, False)
    return -code


async def request_on_socket(
    call: Call, endpoint: Endpoint, sock: _socket.socket, request: bytes
) -> Record:
    """Send a request on the socket's own connection, and return the reply.

    While the socket is used for this, the program can at most cause the reply to be lost.

    Raises OSError with the errno of the reply, or if vsockd cannot be reached.
    """
    blocks = os.get_blocking(sock.fileno())
    while True:
        await _attach(call, endpoint, sock, VSOCKD_REPLY_TIMEOUT_SECONDS, blocks)
        if _send_attached(endpoint, sock, request, None):
            return (await receive_record(sock))[0]


def _send_attached(
    endpoint: Endpoint, sock: _socket.socket, request: bytes, credentials: Credentials | None
) -> bool:
    """Send a request on an attached socket; return False if it is not attached after all."""
    try:
        send(sock, request, credentials)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        endpoint.is_attached = False
        return False
    return True


async def _attach(
    call: Call, endpoint: Endpoint, sock: _socket.socket, seconds: float, blocks: bool
) -> None:
    """Connect a program's socket to vsockd, once, and wait while vsockd's backlog is full.

    Raises OSError(ETIMEDOUT) after ``seconds``, OSError(ENOBUFS) at once if they are 0.
    """
    vsockd = call.services.vsockd
    deadline = time.monotonic() + seconds
    while not endpoint.is_attached:
        if vsockd.attach(sock, endpoint.type, blocks):
            endpoint.is_attached = True
        else:
            await vsockd.wait_for_room(deadline, seconds)


def _require_connectable(endpoint: Endpoint) -> None:
    if endpoint.is_shut:
        raise failure(errno.EINVAL)
    if endpoint.phase in _REFUSED:
        raise failure(_REFUSED[endpoint.phase])


async def _wait(endpoint: Endpoint, sock: _socket.socket, seconds: float, polls: bool) -> bool:
    """Wait for vsockd's reply; return whether it came within ``seconds``."""
    deadline = time.monotonic() + seconds
    while endpoint.phase is Phase.CONNECTING:
        rest = max(0.0, deadline - time.monotonic())
        if not await ready(sock.fileno(), rest, defers_signals=polls):
            return False
        take_reply(endpoint, sock)
    return True


def _send(
    endpoint: Endpoint,
    sock: _socket.socket,
    peer: tuple[int, int],
    polls: bool,
    credentials: Credentials | None,
) -> bool:
    """Send the request to connect; return False if the socket is not attached after all."""
    if endpoint.type == SOCK_STREAM:
        refuse_descriptors(sock)  # a stream carries no descriptors
    secret = 0 if endpoint.holder is None else endpoint.holder.secret
    sizes, cookie = endpoint.buffers, endpoint.cookie
    request = client.connect(peer, sizes=sizes, cookie=cookie, polling=polls, secret=secret)
    if not _send_attached(endpoint, sock, request, credentials):
        return False
    if polls:
        # After the request: a small send buffer would split it in two.
        endpoint.send_buffer = sock.getsockopt(SOL_SOCKET, SO_SNDBUF)
        sock.setsockopt(SOL_SOCKET, SO_SNDBUF, 0)
    endpoint.phase = Phase.CONNECTING
    return True


def take_reply(endpoint: Endpoint, sock: _socket.socket) -> None:
    """Receive vsockd's reply to a connect, if it has arrived, on ``sock``, a copy of the socket."""
    if endpoint.phase is not Phase.CONNECTING:
        return
    try:
        record, _ = take_record(sock)
    except BlockingIOError:
        return
    except OSError as error:
        endpoint.fail(error.errno or errno.EIO, bool(endpoint.send_buffer))
        _restore_send_buffer(endpoint, sock)
    else:
        endpoint.error = 0
        _restore_send_buffer(endpoint, sock)
        establish(endpoint, sock, record)


def _restore_send_buffer(endpoint: Endpoint, sock: _socket.socket) -> None:
    if endpoint.send_buffer:
        # The kernel doubles the value, to have room for its own headers.
        sock.setsockopt(SOL_SOCKET, SO_SNDBUF, endpoint.send_buffer // 2)
        endpoint.send_buffer = 0


def establish(endpoint: Endpoint, sock: _socket.socket, record: Record) -> None:
    """Make ``sock`` the stream that ``record`` describes."""
    endpoint.establish(record)
    # A default that the program did not choose should not slow a stream down.
    if endpoint.type == SOCK_SEQPACKET or record.size != STREAM_BUFFER_DEFAULT_BYTES:
        limit_queue(endpoint, sock)


def limit_queue(endpoint: Endpoint, sock: _socket.socket) -> None:
    """Limit unread bytes, and the size of a packet, to the size of the buffer."""
    size = min(endpoint.buffers.size, SEND_BUFFER_MAX_BYTES)
    overhead = _PACKET_OVERHEAD if endpoint.type == SOCK_SEQPACKET else 0
    # The kernel doubles the value.
    half = (size + overhead + 1) // 2
    sock.setsockopt(SOL_SOCKET, SO_SNDBUF, half)
    if sock.getsockopt(SOL_SOCKET, SO_SNDBUF) < size <= SUPERVISOR_FORCED_SEND_BUFFER_MAX_BYTES:
        with contextlib.suppress(PermissionError):  # above net.core.wmem_max
            sock.setsockopt(SOL_SOCKET, SO_SNDBUFFORCE, half)


async def listen(call: Call, endpoint: Endpoint) -> Answer:
    """Serve listen(): accept connections, or change the backlog."""
    if endpoint.is_datagram:
        raise failure(errno.EOPNOTSUPP)
    if endpoint.phase is Phase.LOST:
        raise failure(errno.ENETDOWN)
    if endpoint.phase not in (Phase.BOUND, Phase.LISTENING):
        raise failure(errno.EINVAL)
    backlog = max(0, call.integer(1))
    with closing(call.duplicate(endpoint)) as sock:
        if endpoint.has_name:
            sock.listen(backlog)
            endpoint.phase = Phase.LISTENING
            if endpoint.holder is not None:
                await call.shield(endpoint.holder.listen(backlog, endpoint.buffers))
            return 0
        request = client.listen(backlog, endpoint.buffers)
        if endpoint.phase is Phase.LISTENING:
            sock.send(request, SEND)  # a reply would look like a connection
        else:
            await call.shield(request_on_socket(call, endpoint, sock, request))
            endpoint.phase = Phase.LISTENING
    return 0


async def accept(call: Call, endpoint: Endpoint) -> Answer:
    """Serve accept(): accept4() without flags."""
    return await _accept(call, endpoint, 0)


async def accept4(call: Call, endpoint: Endpoint) -> Answer:
    """Serve accept4(): wait for a connection, unless the socket is non-blocking."""
    return await _accept(call, endpoint, call.integer(3))


async def _accept(call: Call, endpoint: Endpoint, flags: int) -> Answer:
    if flags & ~_ACCEPT_FLAGS:
        raise failure(errno.EINVAL)
    if endpoint.is_datagram:
        raise failure(errno.EOPNOTSUPP)
    address, size_at = call.arguments[1:3]
    # Fails before a connection is taken; duplicate() proves the size.
    room = call.read_room(size_at) if address else 0
    while True:
        _require_listening(endpoint)
        with closing(call.duplicate(endpoint)) as listener:
            blocks = os.get_blocking(listener.fileno())
            taken = await _take(endpoint, listener, blocks)
            if taken is not None:
                break
            if not blocks:
                raise failure(errno.EAGAIN)
            seconds = timeout_of(listener, SO_RCVTIMEO) or None
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
            if address:
                call.write(*call.pieces_for(pack_address(record.peer), address, size_at, room))
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


async def _take(
    endpoint: Endpoint, listener: _socket.socket, blocks: bool
) -> tuple[int, Record] | None:
    """Return the descriptor and the record of the next connection, or None.

    ``blocks`` is whether the listener is a blocking socket.

    Raises OSError if the listener has failed, CallInterrupted if the call no longer waits.
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
            token = _next_token(endpoint, listener, blocks)
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


def _next_token(
    endpoint: Endpoint, listener: _socket.socket, blocks: bool
) -> _socket.socket | None:
    """Return the next token (``daemon/listeners.py``) in the backlog of ``listener``, or None."""
    if endpoint.arriving:
        return endpoint.arriving.popleft()
    if blocks:
        # Also after an event: all that wait for a listener get it, and accept() of a blocking
        # socket takes a tick to fail.
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        if not poll.poll(0):
            return None
    try:
        # A process outside supervision may share the listener, and accept first.
        with BriefBlocking(listener, SO_RCVTIMEO, blocks):
            fd, _ = listener._accept()  # type: ignore[attr-defined]  # as socket.accept()
    except (BlockingIOError, ConnectionAbortedError):
        return None
    return _socket.socket(AF_UNIX, endpoint.type, 0, fd)


async def shutdown(call: Call, endpoint: Endpoint) -> Answer:
    """Serve shutdown(): shut down the unix socket; ENOTCONN before a connect has begun."""
    how = call.integer(1)
    if not SHUT_RD <= how <= SHUT_RDWR:
        raise failure(errno.EINVAL)
    if endpoint.phase in _BEFORE_A_CONNECT and endpoint.peer is None and not endpoint.is_shut:
        raise failure(errno.ENOTCONN)
    endpoint.is_shut = True
    if endpoint.is_datagram:
        endpoint.peer = None
    elif endpoint.phase is Phase.CONNECTING:
        with closing(call.duplicate(endpoint)) as sock:
            sock.shutdown(SHUT_RDWR)  # vsockd's reply no longer matters
        endpoint.fail(0, True)
        return 0
    call.let_through()
    return None
