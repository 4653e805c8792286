"""setsockopt(), getsockopt() and the ioctls of ``/dev/vsock``."""

from __future__ import annotations

import contextlib
import errno
import struct
from contextlib import closing
from socket import (
    SO_ACCEPTCONN,
    SO_DOMAIN,
    SO_ERROR,
    SO_PEERCRED,
    SOL_SOCKET,
)

from ..._linux.sockets import TIMEVAL
from ...limits import CONNECT_TIMEOUT_MAX_SECONDS, CONNECT_TIMEOUT_SECONDS
from ...model.address import FIRST_GUEST_CID
from ...model.buffers import BufferSizes
from ...model.constants import (
    AF_VSOCK,
    SO_VM_SOCKETS_BUFFER_MAX_SIZE,
    SO_VM_SOCKETS_BUFFER_MIN_SIZE,
    SO_VM_SOCKETS_BUFFER_SIZE,
    SO_VM_SOCKETS_CONNECT_TIMEOUT_NEW,
    SO_VM_SOCKETS_CONNECT_TIMEOUT_OLD,
    SO_VM_SOCKETS_PEER_HOST_VM_ID,
    SO_VM_SOCKETS_TRUSTED,
    VMADDR_CID_HOST,
)
from ...protocol import client
from ...socket import Phase
from ..call import Answer, Call, failure
from ..filter import IOCTL_AF_VALUE, IOCTL_LOCAL_CID, SIOCOUTQ
from ..sockets import UNCONNECTED, Endpoint, inode_in
from ..vsockd_client import SEND
from .connecting import limit_queue, take_reply
from .creating import is_device

_U64 = struct.Struct("=Q")
_U32 = struct.Struct("=I")
_INT = struct.Struct("=i")
_UCRED = struct.Struct("=iII")
_NOBODY = (0, 0xFFFF_FFFF, 0xFFFF_FFFF)

_TIMEOUTS = (SO_VM_SOCKETS_CONNECT_TIMEOUT_OLD, SO_VM_SOCKETS_CONNECT_TIMEOUT_NEW)
_CHANGE_BUFFERS = {
    SO_VM_SOCKETS_BUFFER_SIZE: BufferSizes.with_size,
    SO_VM_SOCKETS_BUFFER_MIN_SIZE: BufferSizes.with_minimum,
    SO_VM_SOCKETS_BUFFER_MAX_SIZE: BufferSizes.with_maximum,
}
#: Bytes kept of the value of an ignored option, and the number of such options kept.
_LONGEST_IGNORED, _MOST_IGNORED = 64, 64

#: The result of VMCISock_Version(): 2.0 as of VMware's drivers, major number in the upper half.
_PROTOCOL_VERSION = 2 << 16


async def setsockopt(call: Call, endpoint: Endpoint) -> Answer:
    """Serve setsockopt(): options of other families are accepted without effect."""
    level, name, address, size = (
        call.integer(1),
        call.integer(2),
        call.arguments[3],
        call.integer(4),
    )
    if size < 0:
        raise failure(errno.EINVAL)
    if level != AF_VSOCK:
        _ignore(endpoint, (level, name), call.read(address, min(size, _LONGEST_IGNORED)))
        return 0
    if endpoint.is_datagram:
        # "Currently vSockets offers no options for datagram connections" (guide page 20).
        raise failure(errno.EOPNOTSUPP)
    if name in _TIMEOUTS:
        endpoint.connect_timeout = _seconds(_read_exactly(call, TIMEVAL))
    elif name in _CHANGE_BUFFERS:
        (value,) = _read_exactly(call, _U64)
        endpoint.buffers = _CHANGE_BUFFERS[name](endpoint.buffers, value)
        if endpoint.holder is not None:
            endpoint.holder.update(endpoint.buffers)
        elif endpoint.phase is Phase.LISTENING and not endpoint.has_name:
            with closing(call.duplicate(endpoint)) as sock:
                sock.send(client.update(endpoint.buffers), SEND)
        elif endpoint.phase is Phase.CONNECTED:
            # As in Linux.  The guide's "consistent until the connection is closed" holds for
            # programs that set it before they connect.
            with closing(call.duplicate(endpoint)) as sock:
                limit_queue(endpoint, sock)
            await _report_size(call, endpoint)
    else:
        raise failure(errno.ENOPROTOOPT)
    return 0


async def _report_size(call: Call, endpoint: Endpoint) -> None:
    """Report a socket's new buffer size to vsockd.

    A device at the other end of the stream grants the size to its guest as credit.
    """
    size = endpoint.buffers.size
    request = client.resize(size, cookie=endpoint.cookie, inode=endpoint.inode)
    with contextlib.suppress(OSError):  # vsockd has ended; the stream continues
        await call.services.vsockd.request(None, request)


def _read_exactly(call: Call, form: struct.Struct) -> tuple[int, ...]:
    if call.integer(4) < form.size:
        raise failure(errno.EINVAL)
    return form.unpack(call.read(call.arguments[3], form.size))


def _seconds(value: tuple[int, ...]) -> float:
    seconds, microseconds = value
    if not 0 <= seconds <= CONNECT_TIMEOUT_MAX_SECONDS or microseconds >= 1_000_000:
        raise failure(errno.ERANGE)
    if microseconds < 0:  # a large unsigned number in Linux
        return float(CONNECT_TIMEOUT_MAX_SECONDS)
    # As in Linux, zero means the default.
    return float(seconds + microseconds / 1e6) or CONNECT_TIMEOUT_SECONDS


def _ignore(endpoint: Endpoint, option: tuple[int, int], value: bytes) -> None:
    if len(endpoint.ignored) < _MOST_IGNORED or option in endpoint.ignored:
        endpoint.ignored[option] = value


async def getsockopt(call: Call, endpoint: Endpoint) -> Answer:
    """Serve getsockopt() where AF_VSOCK and unix sockets differ."""
    level, name, address, size_at = call.integer(1), call.integer(2), *call.arguments[3:5]
    if level == SOL_SOCKET:
        value = _socket_option(call, endpoint, name)
    elif level == AF_VSOCK:
        value = await _vsock_option(call, endpoint, name)
        (room,) = _INT.unpack(call.read(size_at, _INT.size))
        if room < len(value):
            raise failure(errno.EINVAL)
    else:
        value = endpoint.ignored.get((level, name), bytes(_INT.size))
    call.write_value(value, address, size_at, cut=True)
    return 0


def _socket_option(call: Call, endpoint: Endpoint, name: int) -> bytes:
    if name == SO_DOMAIN:
        return _INT.pack(AF_VSOCK)
    if name == SO_ACCEPTCONN:
        return _INT.pack(endpoint.phase is Phase.LISTENING)
    if name == SO_PEERCRED:
        known = endpoint.record
        return _UCRED.pack(*((known.pid, known.uid, known.gid) if known else _NOBODY))
    assert name == SO_ERROR
    with closing(call.duplicate(endpoint)) as sock:
        take_reply(endpoint, sock)
        code, endpoint.error = endpoint.error, 0
        if not code and endpoint.phase is Phase.CONNECTED:
            code = sock.getsockopt(SOL_SOCKET, SO_ERROR)
    return _INT.pack(code)


async def _vsock_option(call: Call, endpoint: Endpoint, name: int) -> bytes:
    if name in _TIMEOUTS:
        whole = int(endpoint.connect_timeout)
        return TIMEVAL.pack(whole, round((endpoint.connect_timeout - whole) * 1e6))
    if name == SO_VM_SOCKETS_BUFFER_SIZE:
        return _U64.pack(endpoint.buffers.size)
    if name == SO_VM_SOCKETS_BUFFER_MIN_SIZE:
        return _U64.pack(endpoint.buffers.minimum)
    if name == SO_VM_SOCKETS_BUFFER_MAX_SIZE:
        return _U64.pack(endpoint.buffers.maximum)
    if name == SO_VM_SOCKETS_PEER_HOST_VM_ID:
        if endpoint.peer is None:
            raise failure(errno.ENOTCONN)
        if endpoint.local[0] >= FIRST_GUEST_CID:  # "only available for hypervisor endpoints"
            raise failure(errno.ENOPROTOOPT)
        return _INT.pack(endpoint.peer[0])
    if name == SO_VM_SOCKETS_TRUSTED:
        peer_cid = VMADDR_CID_HOST if endpoint.peer is None else endpoint.peer[0]
        request = client.local_cid(peer_cid)
        record, _ = await call.services.vsockd.request(call.credentials(), request)
        return _INT.pack(record.is_trusted(datagram=endpoint.is_datagram))
    raise failure(errno.EOPNOTSUPP if endpoint.is_datagram else errno.ENOPROTOOPT)


async def ioctl(call: Call) -> Answer:
    """Serve SIOCOUTQ on vSockets sockets, and the ioctls of ``/dev/vsock`` on both."""
    request, address = call.integer(1), call.arguments[2]
    link = call.services.processes.what_is(call.pid, call.arguments[0] & 0xFFFF_FFFF)
    endpoint = call.services.sockets.known(inode_in(link))
    call.check()
    if request == SIOCOUTQ:
        if endpoint is None:
            call.let_through()
            return None
        if endpoint.is_datagram or endpoint.phase in UNCONNECTED:
            raise failure(errno.EOPNOTSUPP)
        # All that was sent has reached the peer; the kernel would count what it has not read.
        call.write((address, _INT.pack(0)))
        return 0
    if not link:
        raise failure(errno.EBADF)
    if endpoint is None and not is_device(link):
        # Not let through: the descriptor could be the machine's device by then.
        raise failure(errno.ENOTTY)
    if request == IOCTL_LOCAL_CID:
        record, _ = await call.services.vsockd.request(None, client.local_cid())
        call.write((address, _U32.pack(record.peer_cid or record.local_cid)))
    elif request == IOCTL_AF_VALUE:
        call.write((address, _INT.pack(AF_VSOCK)))
    else:
        call.write((address, _U32.pack(_PROTOCOL_VERSION)))
    return 0
