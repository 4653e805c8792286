"""QUERY, UPDATE and RESIZE requests on sockets that were handed to their programs."""

from __future__ import annotations

import contextlib
import errno

from ..fabric import Connection, Context, Endpoint, EndpointKind, Fabric, Refused, trust_of
from ..model.rates import ByteMeter, Moved
from ..protocol import Record, Request, RequestFlag
from .channel import Channel
from .datagrams import Datagrams
from .listeners import encode_accepting, encode_connecting, encode_endpoint
from .streams import Streams

_TRUSTED = (
    (EndpointKind.STREAM, RequestFlag.TRUSTED_STREAM),
    (EndpointKind.DATAGRAM, RequestFlag.TRUSTED_DATAGRAM),
)


class SocketQueries:
    """Answers to clients' queries, from the fabric's state."""

    def __init__(self, fabric: Fabric, streams: Streams, datagrams: Datagrams) -> None:
        self._fabric = fabric
        self._streams = streams
        self._datagrams = datagrams

    def look_up(self, channel: Channel, request: Request) -> bytes:
        """Return the record of the socket with the request's cookie and inode.

        Raises Refused with ENOTCONN when there is no such socket.
        """
        context = channel.context
        accepted = self._accepted(channel, request)
        if accepted is not None:
            return encode_accepting(accepted)
        found = context.cookies.get(request.cookie) or self._datagrams.find(context, request.cookie)
        if isinstance(found, Connection):
            return encode_connecting(found)
        if isinstance(found, Endpoint):
            return encode_endpoint(found)
        raise Refused(errno.ENOTCONN, "no such socket")

    def resize(self, channel: Channel, request: Request) -> None:
        """Report a stream's new buffer size to the device at its other end, if there is one."""
        stream = self._accepted(channel, request)
        if stream is not None:
            _report_size(stream.context, stream.local, stream.peer, request.size)
        else:
            found = channel.context.cookies.get(request.cookie)
            if isinstance(found, Connection):
                _report_size(found.peer_context, found.peer, found.local, request.size)

    def count(self, channel: Channel, request: Request, now: float) -> Connection | None:
        """Store the number of bytes that a program, such as a forwarder, has moved in a stream.

        Only programs of the user who owns that end of the stream, and root's, may report them.
        Returns the stream, if its bytes were stored.
        """
        stream, moved = self._accepted(channel, request), moved_in(request)
        if stream is not None:
            owner, moved = stream.listener.owner, moved.reversed()
        else:
            found = channel.context.cookies.get(request.cookie)
            if not isinstance(found, Connection):
                return None
            stream, owner = found, found.owner
        if channel.credentials.uid not in (0, owner.uid):
            return None
        report_bytes(stream, moved, now)
        return stream

    def local_cid(self, channel: Channel, request: Request) -> bytes:
        """Return the record of the context's CID, of the CID to report instead, and of trust."""
        context = channel.context
        flags = self._trust_flags(channel, request)
        return Record(0, flags, context.cid, peer_cid=context.reported_cid).encode()

    def _trust_flags(self, channel: Channel, request: Request) -> int:
        """Return flags that report for which socket types the client's sockets are trusted.

        For a program of the host the guest is the one in the request, for other programs the
        program's own context.
        """
        guest = self._fabric.contexts.get(request.peer_cid)
        if channel.context.is_guest or guest is None or not guest.is_guest:
            guest = channel.context
        bound = channel.context.cookies.get(request.cookie) or self._datagrams.find(
            channel.context, request.cookie
        )
        known = bound.trust if isinstance(bound, Endpoint) else None
        flags = 0
        for kind, flag in _TRUSTED:
            trust = known or trust_of(channel.asker, kind, self._fabric.settings)
            if trust.for_context(guest):
                flags |= flag
        return flags

    def report_listener_size(self, stream: Connection) -> None:
        """Report a listener's buffer size to a connecting guest's device, if above the stream's."""
        size = stream.listener.sizes.size
        if size > stream.size:
            _report_size(stream.context, stream.local, stream.peer, size)

    def _accepted(self, channel: Channel, request: Request) -> Connection | None:
        # The kernel's inode before the cookie, which any program of the context may have claimed.
        found = self._streams.find_accepted(request.inode) if request.inode else None
        return found if found is not None and found.peer_context is channel.context else None


def moved_in(request: Request) -> Moved:
    """Return the numbers of bytes in a COUNT request."""
    return Moved(request.size, request.minimum)


def report_bytes(stream: Connection, moved: Moved, now: float) -> None:
    """Store the bytes of a stream, from the connecting side's view."""
    if stream.meter is None:
        stream.meter = ByteMeter()
    stream.meter.report(moved, now)


def _report_size(guest: Context, local: tuple[int, int], peer: tuple[int, int], size: int) -> None:
    """Report ``peer``'s buffer size to the device of ``guest``, if it has one."""
    if guest.device is not None:
        with contextlib.suppress(OSError):  # the link is full
            guest.device.streams.send_buffer_size(local, peer, size)
