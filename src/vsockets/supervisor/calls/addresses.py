"""bind(), listen(), getsockname(), getpeername(), shutdown()."""

from __future__ import annotations

import errno
from contextlib import closing
from socket import SHUT_RD, SHUT_RDWR

from ...model.constants import LAST_RESERVED_PORT
from ...protocol import client
from ...socket import UNBOUND, Phase
from ..call import Answer, Call, failure
from ..sockets import Endpoint
from ..vsockd_client import SEND
from . import datagrams
from .connecting import request_on_socket

_CAP_NET_BIND_SERVICE = 10
_BEFORE_A_CONNECT = (Phase.NEW, Phase.BOUND, Phase.LISTENING)


async def bind(call: Call, endpoint: Endpoint) -> Answer:
    """Serve bind(): the errors are those of ``transports.fabric``."""
    address = call.read_address(call.arguments[1], call.integer(2))
    if address is None or endpoint.phase is not Phase.NEW or endpoint.local != UNBOUND:
        raise failure(errno.EINVAL)
    # vsockd checks the capability of the supervisor, but the program must have it.
    unprivileged = address[1] <= LAST_RESERVED_PORT and not _is_privileged(call)
    with closing(call.duplicate(endpoint)) as sock:
        if endpoint.is_datagram:
            await datagrams.bind(call, endpoint, sock, address, unprivileged)
            return 0
        bound = call.services.ports.bind(
            call.credentials(), sock, address, endpoint.buffers, unprivileged
        )
        endpoint.holder, record = await call.shield(bound)
        endpoint.has_name = True
        endpoint.local = record.local
        endpoint.phase = Phase.BOUND
    return 0


def _is_privileged(call: Call) -> bool:
    is_so = call.services.processes.has_capability(call.pid, _CAP_NET_BIND_SERVICE)
    call.check()
    return is_so


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


async def getsockname(call: Call, endpoint: Endpoint) -> Answer:
    """Serve getsockname(): both wildcards while the socket is not bound."""
    call.write(*call.address_pieces(endpoint.local, *call.arguments[1:3]))
    return 0


async def getpeername(call: Call, endpoint: Endpoint) -> Answer:
    """Serve getpeername(): ENOTCONN before a connect and after a shutdown."""
    if endpoint.peer is None or endpoint.is_shut:
        raise failure(errno.ENOTCONN)
    call.write(*call.address_pieces(endpoint.peer, *call.arguments[1:3]))
    return 0


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
