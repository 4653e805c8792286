"""Datagram sockets, and the calls that send: on packet sockets too, to end a record.

A program's datagram socket only receives.  Datagrams are sent by *routes*, as in
``transports.fabric.datagram``, which the supervisor keeps: it copies the data from the program.

A packet that ends a record (MSG_EOR, which unix sockets do not carry) is sent together with a
descriptor, the *marker*: AF_VSOCK carries no descriptors otherwise.  The receiver does not get it;
MSG_CTRUNC shows that a packet had one.
"""

from __future__ import annotations

import _socket
import array
import errno
import os
import struct
from contextlib import closing
from socket import (
    MSG_DONTWAIT,
    MSG_EOR,
    MSG_NOSIGNAL,
    MSG_OOB,
    SCM_RIGHTS,
    SO_SNDTIMEO,
    SOCK_SEQPACKET,
    SOL_SOCKET,
)

from ..._linux.sockets import timeout_of
from ...limits import MAX_DATAGRAM
from ...protocol import client
from ...socket import UNBOUND, Phase
from ..call import Answer, Call, failure
from ..memory import (
    ADDRESS_NEEDED,
    MESSAGE_SIZE,
    MESSAGE_STRIDE,
    MOST_MESSAGES,
    Message,
    read_message,
    read_vectors,
)
from ..scheduler import WRITABLE, ready
from ..sockets import Endpoint
from ..vsockd_client import SEND

_FAMILY = struct.Struct("=H")
_U32 = struct.Struct("=I")

#: Seconds between two checks whether a call that waits for room still waits.
_CHECK_SECONDS = 0.25
#: The errors of a route whose receiver has ended, or that vsockd has revoked.
_ROUTE_ENDED = (ConnectionRefusedError, BrokenPipeError, ConnectionResetError)


async def bind(
    call: Call,
    endpoint: Endpoint,
    sock: _socket.socket,
    address: tuple[int, int],
    unprivileged: bool = False,
) -> None:
    """Bind the socket; vsockd replaces wildcards.

    Raises OSError with vsockd's errno, CallInterrupted if the call no longer waits.
    """
    request = client.bind_datagram(address, unprivileged=unprivileged)
    vsockd, credentials = call.services.vsockd, call.credentials()
    record, _ = await call.shield(vsockd.request(credentials, request, sock.fileno()))
    endpoint.local = record.local
    call.require_uninterrupted()


async def connect(call: Call, endpoint: Endpoint) -> Answer:
    """Serve connect(): set the destination of send(), or remove it with AF_UNSPEC."""
    address, size = call.arguments[1], call.integer(2)
    if size >= _FAMILY.size and _FAMILY.unpack(call.read(address, _FAMILY.size))[0] == 0:
        endpoint.peer = None
        return 0
    peer = call.read_address(address, size)
    if peer is None:
        raise failure(errno.EINVAL)
    if endpoint.local == UNBOUND:
        with closing(call.duplicate(endpoint)) as sock:
            await bind(call, endpoint, sock, UNBOUND)
    endpoint.peer = peer
    endpoint.is_shut = False
    return 0


async def sendto(call: Call, endpoint: Endpoint) -> Answer:
    """Serve sendto() on a datagram socket, and with MSG_EOR on a packet socket."""
    buffer, size = call.arguments[1:3]
    flags, address, address_size = call.integer(3), call.arguments[4], call.integer(5)
    _refuse_urgent(flags)
    if not endpoint.is_datagram:
        if address and endpoint.type == SOCK_SEQPACKET:
            # A unix socket would ignore the address.
            connected = endpoint.phase is Phase.CONNECTED
            raise failure(errno.EISCONN if connected else errno.EOPNOTSUPP)
        return await _send_end_of_record(call, endpoint, Message.of(buffer, size), flags)
    destination = endpoint.peer
    if address:
        # As in Linux, an invalid address counts as null.
        destination = call.read_address(address, address_size) or destination
    _check_size(size)
    return await _send(call, endpoint, call.read(buffer, size), flags, destination)


async def write(call: Call, endpoint: Endpoint) -> Answer:
    """Serve write(): send() without flags."""
    if not endpoint.is_datagram:
        call.let_through()
        return None
    buffer, size = call.arguments[1:3]
    _check_size(size)
    return await _send(call, endpoint, call.read(buffer, size), 0, endpoint.peer)


async def writev(call: Call, endpoint: Endpoint) -> Answer:
    """Serve writev(): write() from several buffers."""
    if not endpoint.is_datagram:
        call.let_through()
        return None
    vectors = read_vectors(call, call.arguments[1], call.arguments[2])
    _check_size(sum(size for _, size in vectors))
    data = b"".join(call.read(address, size) for address, size in vectors)
    return await _send(call, endpoint, data, 0, endpoint.peer)


async def sendmsg(call: Call, endpoint: Endpoint) -> Answer:
    """Serve sendmsg(); ancillary data does not cross contexts."""
    _refuse_urgent(call.integer(2))
    message = read_message(call, call.arguments[1])
    if not endpoint.is_datagram:
        return await _send_end_of_record(call, endpoint, message, call.integer(2))
    return await _send_message(call, endpoint, message, call.integer(2))


async def sendmmsg(call: Call, endpoint: Endpoint) -> Answer:
    """Serve sendmmsg(): return the number of datagrams sent, unless the first one fails."""
    if not endpoint.is_datagram:
        call.let_through()
        return None
    sent = 0
    for number in range(min(call.arguments[2] & 0xFFFF_FFFF, MOST_MESSAGES)):
        at = call.arguments[1] + number * MESSAGE_STRIDE
        try:
            size = await _send_message(call, endpoint, read_message(call, at), call.integer(3))
        except OSError:
            if sent:
                break
            raise
        call.write((at + MESSAGE_SIZE, _U32.pack(size)))
        sent += 1
    return sent


async def _send_message(call: Call, endpoint: Endpoint, message: Message, flags: int) -> int:
    destination = endpoint.peer
    if message.name:
        destination = call.read_address(message.name, message.name_size) or destination
    _check_size(message.size)
    return await _send(call, endpoint, message.read(call), flags, destination)


def _refuse_urgent(flags: int) -> None:
    if flags & MSG_OOB:  # supported by unix sockets, not by vSockets
        raise failure(errno.EOPNOTSUPP)


def _check_size(size: int) -> None:
    if size > MAX_DATAGRAM:
        raise failure(errno.EMSGSIZE, f"datagram too long: {size} bytes (maximum {MAX_DATAGRAM})")


async def _send(
    call: Call,
    endpoint: Endpoint,
    data: bytes,
    flags: int,
    destination: tuple[int, int] | None,
) -> int:
    if destination is None:
        raise failure(ADDRESS_NEEDED)
    routes = call.services.routes
    route = routes.find(endpoint, destination)
    is_new = route is None
    if route is None:
        route = await _new_route(call, endpoint, destination)
    while True:
        try:
            return route.send(data, SEND)
        except BlockingIOError:
            seconds = _send_timeout(call, endpoint, flags)
            if not await ready(route.fileno(), seconds, WRITABLE):
                raise failure(errno.EAGAIN) from None
            call.check()
            route = routes.find(endpoint, destination) or route
        except _ROUTE_ENDED:
            if is_new:
                raise failure(errno.ECONNREFUSED) from None
            # Another socket may have the address now.
            is_new = True
            route = await _new_route(call, endpoint, destination)


async def _new_route(
    call: Call, endpoint: Endpoint, destination: tuple[int, int]
) -> _socket.socket:
    request = client.route(destination)
    with closing(call.duplicate(endpoint)) as sock:
        vsockd, credentials = call.services.vsockd, call.credentials()
        record, fd = await call.shield(vsockd.request(credentials, request, sock.fileno()))
    if fd is None:
        raise client.missing_descriptor()
    endpoint.local = record.local
    route = call.services.routes.add(endpoint, destination, fd)
    call.require_uninterrupted()
    return route


def _send_timeout(call: Call, endpoint: Endpoint, flags: int) -> float | None:
    """Return how many seconds to wait for room at the receiver, or None for no limit.

    Raises OSError(ENOBUFS) if the call does not wait.  EAGAIN would be wrong: polling the program's
    own socket does not show when the receiver has room.
    """
    with closing(call.duplicate(endpoint)) as sock:
        if flags & MSG_DONTWAIT or not os.get_blocking(sock.fileno()):
            raise failure(errno.ENOBUFS)
        return timeout_of(sock, SO_SNDTIMEO) or None


async def _send_end_of_record(
    call: Call, endpoint: Endpoint, message: Message, flags: int
) -> Answer:
    """Send a message that ends a record; let the kernel send any other."""
    is_ours = endpoint.type == SOCK_SEQPACKET and endpoint.phase is Phase.CONNECTED
    if not is_ours or not flags & MSG_EOR:
        call.let_through()
        return None
    if message.size > endpoint.buffers.size:
        raise failure(errno.EMSGSIZE)
    data = message.read(call)
    marker = [(SOL_SOCKET, SCM_RIGHTS, array.array("i", [call.services.marker]))]
    with closing(call.duplicate(endpoint)) as sock:
        waits = not flags & MSG_DONTWAIT and os.get_blocking(sock.fileno())
        while True:
            try:
                return sock.sendmsg([data], marker, MSG_DONTWAIT | MSG_NOSIGNAL)
            except BlockingIOError:
                if not waits:
                    raise
            except BrokenPipeError:
                # Nothing can be sent any longer; the kernel raises SIGPIPE where due.
                call.let_through()
                return None
            except PermissionError:
                # The peer is a program of the library, which refuses descriptors, and MSG_EOR is
                # not shown to it.
                call.let_through()
                return None
            await ready(sock.fileno(), _CHECK_SECONDS, WRITABLE)
            call.check()
