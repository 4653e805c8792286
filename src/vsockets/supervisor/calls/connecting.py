"""connect(): a program's unix socket becomes one end of a stream.

vsockd replies on the program's own socket.  The supervisor takes the reply before the call
returns, even if the program does not wait: vsockd replies in a tenth of a millisecond.  Only if it
does not, the program gets EINPROGRESS before the reply.  Until then the socket polls as not
writable (docs/internals/design.md), and the supervisor takes the reply when it comes, at the
latest at the program's next call on the socket.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import os
import time
from contextlib import closing
from socket import SO_SNDBUF, SOCK_SEQPACKET, SOCK_STREAM, SOL_SOCKET

from ..._linux.sockets import SO_SNDBUFFORCE, refuse_descriptors
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
from ..scheduler import ready
from ..sockets import Endpoint
from ..vsockd_client import Credentials, receive_record, send, take_record
from . import datagrams

#: Bytes that the kernel adds to each message of a packet socket: a message larger than the send
#: buffer less this fails (EMSGSIZE).
_PACKET_OVERHEAD = 32


#: The errors of connect() in phases in which a socket cannot be connected.
_REFUSED = {
    Phase.LISTENING: errno.EINVAL,
    Phase.CONNECTING: errno.EALREADY,
    Phase.CONNECTED: errno.EISCONN,
    Phase.FAILED: errno.EALREADY,
    Phase.LOST: errno.ENETDOWN,
}


async def connect(call: Call, endpoint: Endpoint) -> Answer:
    """Serve connect(): the errors are those of ``transports.fabric``."""
    if endpoint.is_datagram:
        return await datagrams.connect(call, endpoint)
    peer = call.read_address(call.arguments[1], call.integer(2))
    with closing(call.duplicate(endpoint)) as sock:
        take_reply(endpoint, sock)
        _require_connectable(endpoint)
        if peer is None:
            raise failure(errno.EINVAL)
        if peer[0] == VMADDR_CID_ANY:
            raise failure(errno.ENODEV)
        polls = not os.get_blocking(sock.fileno())
        deadline = time.monotonic() + endpoint.connect_timeout
        # A program that does not wait cannot be told that connecting has not begun: fail instead.
        seconds = 0 if polls else endpoint.connect_timeout
        await _attach(call, endpoint, sock, seconds)
        _require_connectable(endpoint)  # another thread may have come first
        _send(endpoint, sock, peer, polls, call.credentials())
        if polls:
            if not await _wait(endpoint, sock, SUPERVISOR_CONNECT_GRACE_SECONDS):
                call.answer(-errno.EINPROGRESS)
                await _wait(endpoint, sock, deadline - time.monotonic())
        else:
            try:
                await _wait(endpoint, sock, endpoint.connect_timeout)
            except CallInterrupted:  # as with TCP, connecting goes on after EINTR
                call.answered = True
                await _wait(endpoint, sock, deadline - time.monotonic())
        if endpoint.phase is Phase.CONNECTING:
            endpoint.fail(errno.ETIMEDOUT, polls)
    if polls and endpoint.error != errno.EADDRNOTAVAIL:
        # The peer's decision is known already, but a non-blocking connect reports it by SO_ERROR.
        return -errno.EINPROGRESS
    code, endpoint.error = endpoint.error, 0
    if code:
        endpoint.fail(0, False)
    return -code


async def request_on_socket(
    call: Call, endpoint: Endpoint, sock: _socket.socket, request: bytes
) -> Record:
    """Send a request on the socket's own connection, and return the reply.  Raises OSError.

    What the program does with its socket meanwhile can only lose the reply.
    """
    await _attach(call, endpoint, sock, VSOCKD_REPLY_TIMEOUT_SECONDS)
    send(sock, request, None)
    return (await receive_record(sock))[0]


async def _attach(call: Call, endpoint: Endpoint, sock: _socket.socket, seconds: float) -> None:
    """Connect a program's socket to vsockd, once, and wait while vsockd's backlog is full.

    Raises OSError ETIMEDOUT after ``seconds``, ENOBUFS at once if they are 0.
    """
    vsockd = call.services.vsockd
    deadline = time.monotonic() + seconds
    while not endpoint.is_attached:
        if vsockd.attach(sock, endpoint.type):
            endpoint.is_attached = True
        else:
            await vsockd.wait_for_room(deadline, seconds)


def _require_connectable(endpoint: Endpoint) -> None:
    if endpoint.is_shut:
        raise failure(errno.EINVAL)
    if endpoint.phase in _REFUSED:
        raise failure(_REFUSED[endpoint.phase])


async def _wait(endpoint: Endpoint, sock: _socket.socket, seconds: float) -> bool:
    """Wait for vsockd's reply; return whether it came within ``seconds``."""
    deadline = time.monotonic() + seconds
    while endpoint.phase is Phase.CONNECTING:
        if not await ready(sock.fileno(), max(0.0, deadline - time.monotonic())):
            return False
        take_reply(endpoint, sock)
    return True


def _send(
    endpoint: Endpoint,
    sock: _socket.socket,
    peer: tuple[int, int],
    polls: bool,
    credentials: Credentials | None,
) -> None:
    if endpoint.type == SOCK_STREAM:
        refuse_descriptors(sock)  # a stream carries no descriptors
    secret = 0 if endpoint.holder is None else endpoint.holder.secret
    sizes, cookie = endpoint.buffers, endpoint.cookie
    request = client.connect(peer, sizes=sizes, cookie=cookie, polling=polls, secret=secret)
    send(sock, request, credentials)
    if polls:
        # After the request: a small send buffer would split it in two.
        endpoint.send_buffer = sock.getsockopt(SOL_SOCKET, SO_SNDBUF)
        sock.setsockopt(SOL_SOCKET, SO_SNDBUF, 0)
    endpoint.phase = Phase.CONNECTING


def take_reply(endpoint: Endpoint, sock: _socket.socket) -> None:
    """Receive vsockd's reply to a connect, if it is there, on ``sock``, a copy of the socket."""
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
