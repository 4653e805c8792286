"""Capture of the traffic at a virtual machine's device, for clients that may capture.

vsockd connects the two sides and keeps neither: it creates a socket pair, and sends one end to the
device and the other to the client.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
from socket import AF_UNIX, SO_SNDBUF, SOCK_SEQPACKET, SOL_SOCKET, socketpair

from .._linux.sockets import SO_SNDBUFFORCE
from ..fabric import Fabric, Refused, policy
from ..limits import CAPTURE_PAYLOAD_MAX_BYTES
from ..protocol import Request
from .channel import Channel
from .device_link import DeviceLink
from .limits import CAPTURE_BUFFER_MAX_BYTES


def capture(fabric: Fabric, channel: Channel, request: Request) -> _socket.socket:
    """Return the socket on which the client receives records (:mod:`.protocol.vsockmon`).

    Raises Refused with EACCES (the client may not capture), ENOENT (no such context), ENOTSUP (it
    has no device) or ENOBUFS (the device's link is full).
    """
    policy.require_capture(channel.context, channel.asker, fabric.settings)
    context = fabric.contexts.require(request.peer_cid)
    if context.device is None:
        raise Refused(errno.ENOTSUP, f"context {context.cid} has no device")
    assert isinstance(context.device.streams, DeviceLink)
    theirs, ours = socketpair(AF_UNIX, SOCK_SEQPACKET)
    with ours:
        try:
            ours.setsockopt(SOL_SOCKET, SO_SNDBUF, CAPTURE_BUFFER_MAX_BYTES)
            with contextlib.suppress(PermissionError):  # above net.core.wmem_max
                ours.setsockopt(SOL_SOCKET, SO_SNDBUFFORCE, CAPTURE_BUFFER_MAX_BYTES)
            limit = min(request.size, CAPTURE_PAYLOAD_MAX_BYTES)
            context.device.streams.send_capture(ours.fileno(), limit, request.peer_port)
        except OSError:
            theirs.close()
            raise Refused(errno.ENOBUFS, "the device's link is full") from None
    return theirs
