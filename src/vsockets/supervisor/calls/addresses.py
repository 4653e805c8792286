"""bind(), getsockname() and getpeername()."""

from __future__ import annotations

import errno
from contextlib import closing

from ...model.constants import LAST_RESERVED_PORT
from ...socket import UNBOUND, Phase
from ..call import Answer, Call, failure
from ..sockets import Endpoint
from . import datagrams

_CAP_NET_BIND_SERVICE = 10


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


def getsockname(call: Call, endpoint: Endpoint) -> None:
    """Serve getsockname(): VMADDR_CID_ANY and VMADDR_PORT_ANY while the socket is not bound."""
    _answer(call, endpoint.local)


def getpeername(call: Call, endpoint: Endpoint) -> None:
    """Serve getpeername(): ENOTCONN before a connect and after a shutdown."""
    if endpoint.peer is None or endpoint.is_shut:
        raise failure(errno.ENOTCONN)
    _answer(call, endpoint.peer)


def _answer(call: Call, found: tuple[int, int]) -> None:
    call.write_address(found, call.arguments[1], call.arguments[2])
    # Not kept for the case of a signal: the thread repeats the call, and it is served again.
    call.answer(0)
