"""Encode endpoints and connections as records of vsockd's protocol."""

from __future__ import annotations

from ..fabric import Connection, Endpoint, EndpointKind
from ..model.constants import VMADDR_CID_ANY, VMADDR_PORT_ANY
from ..protocol import Record, RequestFlag, Role, encode_stream
from .listeners import NamedListener

# The two records of every connect spell out their arguments: starred ones cost a function call.
_CONNECTED = int(Role.CONNECTED)


def encode_endpoint(endpoint: Endpoint) -> bytes:
    """Encode a bound socket."""
    role = Role.BOUND
    if endpoint.kind is EndpointKind.DATAGRAM:
        role = Role.DATAGRAM
    elif endpoint.listening:
        role = Role.LISTENING
    return Record(
        0,
        int(RequestFlag.NAMED) if isinstance(endpoint.handle, NamedListener) else 0,
        *endpoint.address,
        VMADDR_CID_ANY,
        VMADDR_PORT_ANY,
        role,
        *endpoint.owner,
        *endpoint.sizes,
    ).encode()


def encode_connecting(stream: Connection) -> bytes:
    """Encode a stream as seen from its connecting side."""
    cid, port = stream.local
    peer_cid, peer_port = stream.peer
    pid, uid, gid = stream.listener.owner
    _, minimum, maximum = stream.sizes
    return encode_stream(
        cid, port, peer_cid, peer_port, _CONNECTED, pid, uid, gid, stream.size, minimum, maximum
    )


def encode_offer(stream: Connection, flags: int, polling: bool) -> bytes:
    """Encode a pending connection for a device, with the requested buffer sizes."""
    if polling:
        flags |= RequestFlag.POLLING
    return Record(
        0, flags, *stream.peer, *stream.local, Role.CONNECTED, *stream.owner, *stream.sizes
    ).encode()


def encode_accepting(stream: Connection) -> bytes:
    """Encode a stream as seen from its accepting side."""
    cid, port = stream.peer
    peer_cid, peer_port = stream.local
    pid, uid, gid = stream.owner
    _, minimum, maximum = stream.listener.sizes
    return encode_stream(
        cid, port, peer_cid, peer_port, _CONNECTED, pid, uid, gid, stream.size, minimum, maximum
    )
