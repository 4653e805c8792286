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
from ..call import Answer, Call, Serving, failure
from ..interception import CallInterrupted
from ..limits import SUPERVISOR_CONNECT_GRACE_SECONDS, SUPERVISOR_FORCED_SEND_BUFFER_MAX_BYTES
from ..scheduler import Wait, lent, ready
from ..sockets import Endpoint, Stream
from ..vsockd_client import (
    SEND,
    Credentials,
    VsockdClient,
    call_briefly,
    receive_record,
    send,
    take_record,
)
from . import datagrams

#: Bytes that the kernel adds to each message of a packet socket: a message larger than the send
#: buffer less this fails (EMSGSIZE).
_PACKET_OVERHEAD = 32
_ACCEPT_FLAGS = int(SOCK_CLOEXEC | SOCK_NONBLOCK)
_CONNECTING, _LISTENING = Phase.CONNECTING, Phase.LISTENING
#: Phases in which shutdown() fails.
_BEFORE_A_CONNECT = (Phase.NEW, Phase.BOUND, Phase.LISTENING)
#: Phases of a socket whose connect has not failed.
_BEGUN = (Phase.CONNECTING, Phase.CONNECTED)
_CONNECTABLE = (Phase.NEW, Phase.BOUND)
#: The errors of connect() in phases in which a socket cannot be connected.
_REFUSED = {
    Phase.LISTENING: errno.EINVAL,
    Phase.CONNECTING: errno.EALREADY,
    Phase.CONNECTED: errno.EISCONN,
    Phase.FAILED: errno.EALREADY,
    Phase.LOST: errno.ENETDOWN,
}


def connect(call: Call, endpoint: Endpoint) -> Answer | Serving:
    """Serve connect(): the errors are those of ``transports.fabric``."""
    if endpoint.is_datagram:
        return datagrams.connect(call, endpoint)
    peer, credentials = _read_request(call, endpoint)
    sock = call.duplicate(endpoint)  # proves what was read before
    rest: Serving | None = None
    try:
        take_reply(endpoint, sock)
        if endpoint.interrupted is not None:
            is_repeated = endpoint.interrupted == peer
            if is_repeated and (endpoint.phase in _BEGUN or endpoint.error):
                rest = _finish_interrupted(endpoint, sock)
                return rest
            if endpoint.phase is not _CONNECTING:
                endpoint.interrupted = None
        _require_connectable(endpoint)
        if peer is None:
            raise failure(errno.EINVAL)
        if peer[0] == VMADDR_CID_ANY:
            raise failure(errno.ENODEV)
        polls = not os.get_blocking(sock.fileno())
        if _try_to_attach(call, endpoint, sock, not polls) and _send(
            endpoint, sock, peer, polls, credentials
        ):
            call.services.vsockd.await_briefly(sock)
            take_reply(endpoint, sock)
            if endpoint.phase is not _CONNECTING:  # nearly always
                return _outcome(endpoint, polls)
        rest = _connect_later(call, endpoint, sock, peer, polls, credentials)
        return rest
    finally:
        if rest is None:
            sock.close()


def _read_request(
    call: Call, endpoint: Endpoint
) -> tuple[tuple[int, int] | None, Credentials | None]:
    """Return the address and the credentials of a connect; :meth:`.Call.check` proves them later.

    Raises OtherSocket before other errors.
    """
    try:
        peer = call.read_address_unchecked(call.arguments[1], call.integer(2))
        return peer, call.credentials_unchecked()
    except OSError:
        call.duplicate(endpoint).close()
        raise


async def _connect_later(
    call: Call,
    endpoint: Endpoint,
    sock: _socket.socket,
    peer: tuple[int, int],
    polls: bool,
    credentials: Credentials | None,
) -> Answer:
    """Go on with a connect that vsockd has no room for yet, or has not replied to in a moment.

    Takes ownership of ``sock``, a copy of the program's socket.
    """
    with closing(sock):
        deadline = time.monotonic() + endpoint.connect_timeout
        # A program that does not wait cannot learn that connecting has not begun: fail instead.
        seconds = 0 if polls else endpoint.connect_timeout
        while endpoint.phase is not _CONNECTING:
            await _attach(call, endpoint, sock, seconds, not polls)
            _require_connectable(endpoint)  # another thread may have connected the socket meanwhile
            _send(endpoint, sock, peer, polls, credentials)
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
        if endpoint.phase is _CONNECTING:
            endpoint.fail(errno.ETIMEDOUT, polls)
    return _outcome(endpoint, polls)


def _outcome(endpoint: Endpoint, polls: bool) -> Answer:
    """Return the answer to a connect that has ended."""
    if polls and endpoint.error != errno.EADDRNOTAVAIL:
        # The peer's decision is known already, but a non-blocking connect reports it by SO_ERROR.
        return -errno.EINPROGRESS
    if endpoint.interrupted is not None:  # the result is for a repeated connect
        return None
    return _result(endpoint)


async def _finish_interrupted(endpoint: Endpoint, sock: _socket.socket) -> Answer:
    """Return the result of a connect that a signal has interrupted: connect() is called again.

    Takes ownership of ``sock``, a copy of the program's socket.
    """
    with closing(sock):
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
    deadline = time.monotonic() + seconds
    while not _try_to_attach(call, endpoint, sock, blocks):
        await call.services.vsockd.wait_for_room(deadline, seconds)


def _try_to_attach(call: Call, endpoint: Endpoint, sock: _socket.socket, blocks: bool) -> bool:
    """Connect a program's socket to vsockd, once; return False while vsockd's backlog is full."""
    if not endpoint.is_attached:
        endpoint.is_attached = call.services.vsockd.attach(sock, endpoint.type, blocks)
    return endpoint.is_attached


def _require_connectable(endpoint: Endpoint) -> None:
    if endpoint.is_shut:
        raise failure(errno.EINVAL)
    if endpoint.phase not in _CONNECTABLE:
        raise failure(_REFUSED[endpoint.phase])


async def _wait(endpoint: Endpoint, sock: _socket.socket, seconds: float, polls: bool) -> bool:
    """Wait for vsockd's reply; return whether it came within ``seconds``."""
    deadline = time.monotonic() + seconds
    while endpoint.phase is _CONNECTING:
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
    endpoint.phase = _CONNECTING
    return True


def take_reply(endpoint: Endpoint, sock: _socket.socket) -> None:
    """Receive vsockd's reply to a connect, if it has arrived, on ``sock``, a copy of the socket."""
    if endpoint.phase is not _CONNECTING:
        return
    try:
        record, _ = take_record(sock)
    except BlockingIOError:
        return
    except OSError as error:
        endpoint.fail(error.errno or errno.EIO, bool(endpoint.send_buffer))
        if endpoint.send_buffer:
            _restore_send_buffer(endpoint, sock)
    else:
        endpoint.error = 0
        if endpoint.send_buffer:
            _restore_send_buffer(endpoint, sock)
        establish(endpoint, sock.fileno(), record)


def _restore_send_buffer(endpoint: Endpoint, sock: _socket.socket) -> None:
    # The kernel doubles the value, to have room for its own headers.
    sock.setsockopt(SOL_SOCKET, SO_SNDBUF, endpoint.send_buffer // 2)
    endpoint.send_buffer = 0


def establish(endpoint: Endpoint, fd: int, record: Record) -> None:
    """Make the socket ``fd`` the stream that ``record`` describes."""
    endpoint.establish(record)
    # A default that the program did not choose should not slow a stream down.
    if endpoint.type == SOCK_SEQPACKET or record.size != STREAM_BUFFER_DEFAULT_BYTES:
        sock = _socket.socket(AF_UNIX, endpoint.type, 0, fd)
        try:
            limit_queue(endpoint, sock)
        finally:
            sock.detach()


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


def accept(call: Call, endpoint: Endpoint) -> Answer | Serving:
    """Serve accept(): accept4() without flags."""
    return _accept(call, endpoint, 0)


def accept4(call: Call, endpoint: Endpoint) -> Answer | Serving:
    """Serve accept4(): wait for a connection, unless the socket is non-blocking."""
    return _accept(call, endpoint, call.integer(3))


def _accept(call: Call, endpoint: Endpoint, flags: int) -> Answer | Serving:
    if flags & ~_ACCEPT_FLAGS:
        raise failure(errno.EINVAL)
    if endpoint.is_datagram:
        raise failure(errno.EOPNOTSUPP)
    missing = _try_to_accept(call, endpoint, flags, False)
    return None if missing is None else _accept_later(call, endpoint, flags, missing)


async def _accept_later(
    call: Call, endpoint: Endpoint, flags: int, missing: Wait | _socket.socket | None
) -> Answer:
    """Go on with an accept that has to wait for what is ``missing``."""
    while missing is not None:
        has_waited = isinstance(missing, Wait)
        if isinstance(missing, Wait):
            if not await missing:
                raise failure(errno.EAGAIN)
        elif (stream := await _receive_stream(endpoint, missing)) is not None:
            _give(call, endpoint, flags, stream)
            break
        missing = _try_to_accept(call, endpoint, flags, has_waited)
    return None


def _try_to_accept(
    call: Call, endpoint: Endpoint, flags: int, has_waited: bool
) -> Wait | _socket.socket | None:
    """Accept a connection, and give it to the process.

    Returns None if that was possible, and else what is missing: the wait for a connection, or
    a token (``daemon/listeners.py``) whose record is to be awaited.  A call that ``has_waited``
    waits again if necessary.

    Raises OSError(EAGAIN) for a non-blocking socket without a connection.
    """
    listener = call.duplicate(endpoint)
    try:
        if endpoint.phase is not _LISTENING:
            raise failure(errno.ENETDOWN if endpoint.phase is Phase.LOST else errno.EINVAL)
        blocks = has_waited or os.get_blocking(listener.fileno())
        found = _take(call.services.vsockd, endpoint, listener, blocks)
        if found is None:
            if not blocks:
                raise failure(errno.EAGAIN)
            seconds = timeout_of(listener, SO_RCVTIMEO) or None
            return lent(listener.detach(), endpoint.inode, seconds)
    finally:
        listener.close()
    if isinstance(found, _socket.socket):
        return found
    _give(call, endpoint, flags, found)
    return None


def _give(call: Call, endpoint: Endpoint, flags: int, stream: Stream) -> None:
    """Give the process a stream; keep it for the next accept if a signal has interrupted this one.

    Raises OSError if the process cannot have it.  The stream is closed then.
    """
    fd, record = stream
    try:
        accepted = call.services.sockets.adopt(fd, endpoint.type)
        establish(accepted, fd, record)
        os.set_blocking(fd, not flags & SOCK_NONBLOCK)
        # Before the descriptor: with it, another thread may use the memory for something else.
        call.write_address(record.peer, call.arguments[1], call.arguments[2])
        call.answer_with_descriptor(fd, bool(flags & SOCK_CLOEXEC), accepted.served)
    except CallInterrupted:
        endpoint.accepted.append(stream)
        raise
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)


def _take(
    vsockd: VsockdClient, endpoint: Endpoint, listener: _socket.socket, blocks: bool
) -> Stream | _socket.socket | None:
    """Return the next connection's stream, or its token if the record has not come; None without.

    ``blocks`` is whether the listener is a blocking socket.

    Raises OSError if the listener has failed.
    """
    if endpoint.accepted:
        return endpoint.accepted.pop(0)
    if not endpoint.has_name:
        try:
            return _stream_of(take_record(listener))
        except BlockingIOError:
            return None
    while (token := _next_token(endpoint, listener, blocks)) is not None:
        try:
            found = take_record(token)
        except BlockingIOError:  # vsockd has connected the token, and sends it next
            if not vsockd.await_briefly(token):
                return token
            endpoint.arriving.append(token)
        except OSError:  # vsockd has ended: try the next
            token.close()
        else:
            token.close()
            return _stream_of(found)
    return None


async def _receive_stream(endpoint: Endpoint, token: _socket.socket) -> Stream | None:
    """Return the stream that vsockd sends over ``token``, or None if vsockd has ended.

    Takes ownership of ``token``.
    """
    try:
        found = await receive_record(token)
    except CallInterrupted:
        endpoint.arriving.append(token)
        raise
    except OSError:
        token.close()
        return None
    token.close()
    return _stream_of(found)


def _stream_of(found: tuple[Record, int | None]) -> Stream:
    record, fd = found
    if fd is None:
        raise failure(errno.EMFILE, "connection lost: the supervisor has no free descriptor")
    return fd, record


def _next_token(
    endpoint: Endpoint, listener: _socket.socket, blocks: bool
) -> _socket.socket | None:
    """Return the next token in the backlog of ``listener``, or None."""
    if endpoint.arriving:
        return endpoint.arriving.pop(0)
    if blocks:
        # Also after an event: all that wait for a listener get it, and accept() of a blocking
        # socket takes a tick to fail.
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        if not poll.poll(0):
            return None
    try:
        # A process outside supervision may share the listener, and accept first.
        accept = listener._accept  # type: ignore[attr-defined]  # as socket.accept()
        fd, _ = call_briefly(listener, SO_RCVTIMEO, blocks, accept)
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
    elif endpoint.phase is _CONNECTING:
        with closing(call.duplicate(endpoint)) as sock:
            sock.shutdown(SHUT_RDWR)  # vsockd's reply no longer matters
        endpoint.fail(0, True)
        return 0
    call.let_through()
    return None
