"""recvfrom(), recvmsg() and recvmmsg(), which return more than data.

For datagrams, the sender's unix name becomes a struct sockaddr_vm.  For packets, the end of a
record is shown by MSG_EOR (:mod:`.datagrams`).
"""

from __future__ import annotations

import _socket
import errno
import os
import select
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from socket import (
    MSG_CTRUNC,
    MSG_DONTWAIT,
    MSG_EOR,
    MSG_OOB,
    MSG_PEEK,
    MSG_TRUNC,
    SO_RCVTIMEO,
    SOCK_SEQPACKET,
)

from ..._linux import descriptor_passing
from ..._linux.sockets import timeout_of
from ...limits import MAX_DATAGRAM
from ...protocol import decode_source
from ...socket import UNBOUND, Phase
from ..call import Answer, Call, Piece, failure
from ..filter import MSG_ERRQUEUE
from ..interception import CallInterrupted
from ..memory import MESSAGE_SIZE, MESSAGE_STRIDE, MOST_MESSAGES, Message, read_message
from ..scheduler import Wait, lent
from ..sockets import Endpoint, Received, pack_address

_U32 = struct.Struct("=I")

#: Flags that are passed to the kernel; the supervisor implements the others.
_PASSED = int(MSG_PEEK)
#: Flags that receive something other than data.
_OUT_OF_BAND = MSG_ERRQUEUE | int(MSG_OOB)


async def recvfrom(call: Call, endpoint: Endpoint) -> Answer:
    """Serve recvfrom(): receive a datagram with its source."""
    if call.integer(3) & _OUT_OF_BAND:
        return _receive_out_of_band(call, endpoint, call.integer(3))
    if not endpoint.is_datagram:
        call.let_through()
        return None
    buffer, size, flags = call.arguments[1], call.arguments[2], call.integer(3)
    address = call.arguments[4]
    received = await _receive_datagram(call, endpoint, flags)
    with _kept_if_interrupted(endpoint, received, flags):
        data = buffer, received.data[:size]
        if address:
            source = pack_address(received.source or UNBOUND)
            call.write_value(source, address, call.arguments[5], data)
        else:
            call.write(data)
    return len(received.data) if flags & MSG_TRUNC else min(size, len(received.data))


async def recvmsg(call: Call, endpoint: Endpoint) -> Answer:
    """Serve recvmsg(): a datagram with its source, or a packet that may end a record."""
    flags = call.integer(2)
    if flags & _OUT_OF_BAND:
        return _receive_out_of_band(call, endpoint, flags)
    if endpoint.is_datagram:
        message = read_message(call, call.arguments[1])
        received = await _receive_datagram(call, endpoint, flags)
    elif endpoint.type == SOCK_SEQPACKET and endpoint.phase is Phase.CONNECTED:
        found = await _receive_end_of_record(call, endpoint, flags)
        if found is None:
            call.let_through()
            return None
        message, received = read_message(call, call.arguments[1]), found
    else:
        call.let_through()
        return None
    with _kept_if_interrupted(endpoint, received, flags):
        size, pieces = _results(message, received, flags)
        call.write(*pieces)
    return size


async def recvmmsg(call: Call, endpoint: Endpoint) -> Answer:
    """Serve recvmmsg(): wait for the first datagram only."""
    if not endpoint.is_datagram:
        call.let_through()
        return None
    flags = call.integer(3)
    count = 0
    for number in range(min(call.arguments[2] & 0xFFFF_FFFF, MOST_MESSAGES)):
        at = call.arguments[1] + number * MESSAGE_STRIDE
        message = read_message(call, at)
        try:
            received = await _receive_datagram(call, endpoint, flags)
        except OSError:
            if count:
                break
            raise
        with _kept_if_interrupted(endpoint, received, flags):
            size, pieces = _results(message, received, flags)
            call.write(*pieces, (at + MESSAGE_SIZE, _U32.pack(size)))
        count += 1
        flags |= int(MSG_DONTWAIT)
    return count


@contextmanager
def _kept_if_interrupted(endpoint: Endpoint, received: Received, flags: int) -> Iterator[None]:
    """Keep a received message for the next call if a signal interrupts this one."""
    try:
        yield
    except CallInterrupted:
        if not flags & MSG_PEEK:
            endpoint.received.append(received)
        raise


def _take_kept(endpoint: Endpoint, flags: int) -> Received | None:
    if not endpoint.received:
        return None
    return endpoint.received[0] if flags & MSG_PEEK else endpoint.received.pop(0)


def _receive_out_of_band(call: Call, endpoint: Endpoint, flags: int) -> int:
    """Return the result of a call with flags that a unix socket would answer with data."""
    if endpoint.is_datagram:
        raise failure(errno.EOPNOTSUPP)
    if flags & MSG_ERRQUEUE:  # it is always empty
        raise failure(errno.EAGAIN)
    if endpoint.phase is not Phase.CONNECTED:
        raise failure(errno.ENOTCONN)
    with closing(call.duplicate(endpoint)) as sock:
        poll = select.poll()
        poll.register(sock, 0)
        try:
            unread = poll.poll(0) == [] or bool(sock.recv(1, MSG_PEEK | MSG_DONTWAIT))
        except BlockingIOError:
            unread = True
    if unread:
        raise failure(errno.EOPNOTSUPP)
    return 0  # end of the stream, as without the flag


def _results(message: Message, received: Received, flags: int) -> tuple[int, list[Piece]]:
    """Return the result of recvmsg() for a received message, and the pieces that it writes."""
    pieces = message.fill(received.data)
    size = min(message.size, len(received.data))
    name = b""
    if received.source is not None and message.name:
        name = pack_address(received.source)
        pieces.append((message.name, name[: message.name_size]))
    shown = received.flags | (MSG_TRUNC if size < len(received.data) else 0)
    pieces += message.results(len(name), shown)
    return len(received.data) if flags & MSG_TRUNC else size, pieces


async def _receive_datagram(call: Call, endpoint: Endpoint, flags: int) -> Received:
    if (again := _take_kept(endpoint, flags)) is not None:
        return again
    while True:
        with closing(call.duplicate(endpoint)) as sock:
            try:
                data, _, _, name = sock.recvmsg(
                    MAX_DATAGRAM, 0, (flags & _PASSED) | int(MSG_DONTWAIT)
                )
            except BlockingIOError:
                wait = _wait(endpoint, sock, flags)
            else:
                return Received(data, 0, decode_source(name))
        if not await wait:
            raise failure(errno.EAGAIN)


async def _receive_end_of_record(call: Call, endpoint: Endpoint, flags: int) -> Received | None:
    """Receive the next packet if it ends a record; return None if the kernel can receive it."""
    if (again := _take_kept(endpoint, flags)) is not None:
        return again
    look = int(MSG_PEEK | MSG_DONTWAIT | MSG_TRUNC)
    while True:
        with closing(call.duplicate(endpoint)) as sock:
            try:
                size, _, shown, _ = sock.recvmsg_into([bytearray(1)], 0, look)
            except BlockingIOError:
                wait = _wait(endpoint, sock, flags)
            else:
                if not shown & MSG_CTRUNC:
                    return None
                # With MSG_TRUNC, the size is that of the whole packet.
                # The descriptor may be no marker, but one that takes long to close.
                data = descriptor_passing.receive(sock, size, (flags & _PASSED) | int(MSG_DONTWAIT))
                return Received(data, int(MSG_EOR), None)
        if not await wait:
            raise failure(errno.EAGAIN)


def _wait(endpoint: Endpoint, sock: _socket.socket, flags: int) -> Wait:
    """Return the wait for a message.

    Raises OSError(EAGAIN) if the call is non-blocking.
    """
    if flags & MSG_DONTWAIT or not os.get_blocking(sock.fileno()):
        raise failure(errno.EAGAIN)
    seconds = timeout_of(sock, SO_RCVTIMEO) or None
    return lent(sock.detach(), endpoint.inode, seconds)
