"""Serving requests: the fabric decides, this moves the descriptors."""

from __future__ import annotations

import _socket
import errno
import logging
import os
from collections.abc import Callable
from contextlib import closing
from socket import (
    AF_UNIX,
    MSG_DONTWAIT,
    MSG_PEEK,
    SO_SNDBUF,
    SOCK_DGRAM,
    SOCK_SEQPACKET,
    SOCK_STREAM,
    SOL_SOCKET,
)

from ..constants import VMADDR_CID_ANY, VMADDR_PORT_ANY
from ..fabric import Connection, Context, Endpoint, Fabric, Kind, Refused
from ..limits import DEFAULT_BUFFER_SIZE, LARGEST_SEND_BUFFER, SILENT_CLIENT
from ..wire import REQUEST_SIZE, Flag, Op, ProtocolError, Record, Request, Role, encode_stream
from .channel import Channel, consume, receive_with_descriptor
from .credentials import CAP_NET_ADMIN, CAP_NET_BIND_SERVICE, has_capability, peer_credentials
from .datagrams import Datagrams, cookie_of
from .disposal import dispose
from .loop import Loop
from .watch import StreamWatch

log = logging.getLogger(__name__)

#: Look for ended streams after so many new ones, and so many seconds after the last.
_REAP_EVERY = 256
_REAP_AFTER = 1.0
_REAP_AT_THE_LATEST = 60.0

# Plain integers: an enum's | costs as much as a system call.
_LOOK = int(MSG_DONTWAIT | MSG_PEEK)
_TAKE = int(MSG_DONTWAIT)


class Broker:
    """Every request of every program, a method for each operation.

    An operation returns whether vsockd goes on holding the channel.
    """

    def __init__(self, loop: Loop, fabric: Fabric) -> None:
        self.fabric = fabric
        self.datagrams = Datagrams(fabric)
        self.refusals = 0
        self._loop = loop
        self._streams = StreamWatch()
        self._channels: dict[Context, set[Channel]] = {}
        self._unreaped = 0
        self._reap_delay: float | None = None  # None: no timer is set
        self._operations: dict[int, Callable[[Channel, Request], bool]] = {
            Op.BIND: self._bind,
            Op.LISTEN: self._listen,
            Op.CONNECT: self._connect,
            Op.UPDATE: self._update,
            Op.BIND_DATAGRAM: self._bind_datagram,
            Op.ROUTE: self._route,
            Op.QUERY: self._query,
            Op.LOCAL_CID: self._local_cid,
        }

    def begin(self) -> None:
        """Called once, in the process that goes on."""
        self._streams.open()

    # Channels

    def admit(self, fd: int, context: Context, kind: Kind) -> None:
        """Take a connection just accepted on ``context``'s control socket."""
        sock_type = SOCK_STREAM if kind is Kind.STREAM else SOCK_SEQPACKET
        sock = _socket.socket(AF_UNIX, sock_type, 0, fd)
        channel = Channel(sock, context, kind, peer_credentials(sock))
        try:
            data = self._read(channel)
        except BlockingIOError:
            # A program connects and then writes, and may have been interrupted in between, by
            # us.  Letting it run is cheaper than coming back to it.
            os.sched_yield()
            try:
                data = self._read(channel)
            except BlockingIOError:
                self._keep(channel)
                self._loop.call_later(SILENT_CLIENT, lambda: self._close_if_silent(channel))
                return
        if self._serve(channel, data):
            self._keep(channel)
        else:
            sock.close()

    def close_context(self, context: Context) -> None:
        """Let go of everything in a context that has been removed."""
        for channel in list(self._channels.pop(context, ())):
            self._drop(channel)
        for endpoint in list(context.datagrams):
            self.datagrams.release(endpoint)
        for holder in list(context.connected):
            if isinstance(holder, Connection):
                self.fabric.end(holder.number)

    def _keep(self, channel: Channel) -> None:
        self._channels.setdefault(channel.context, set()).add(channel)
        self._loop.watch(channel.sock.fileno(), lambda events: self._ready(channel))

    def _ready(self, channel: Channel) -> None:
        try:
            data = self._read(channel)
        except BlockingIOError:
            return
        if not self._serve(channel, data):
            self._drop(channel)

    def _drop(self, channel: Channel) -> None:
        self._loop.unwatch(channel.sock.fileno())
        self._channels.get(channel.context, set()).discard(channel)
        if channel.endpoint is not None:
            self.fabric.unbind(channel.endpoint)
        channel.sock.close()

    def _close_if_silent(self, channel: Channel) -> None:
        if channel.silent and channel in self._channels.get(channel.context, ()):
            log.debug("pid %d connected and said nothing", channel.owner.pid)
            self._drop(channel)

    # Requests

    @staticmethod
    def _read(channel: Channel) -> bytes:
        # A plain recv: descriptors that ride along are dropped by the kernel, unseen.  A
        # message of a packet socket is only looked at, because reading a part of it would
        # take the whole, and with it what keeps a polling sender waiting.
        flags = _LOOK if channel.kind is Kind.SEQPACKET else _TAKE
        try:
            return channel.sock.recv(REQUEST_SIZE, flags)
        except ConnectionError:
            return b""

    def _serve(self, channel: Channel, data: bytes) -> bool:
        if not data:
            return False
        channel.silent = False
        try:
            request = Request.decode(data)
            operation = self._operations.get(request.op)
            if operation is None:
                raise ProtocolError(f"no operation {request.op}")
            return operation(channel, request)
        except Refused as refused:
            self.refusals += 1
            log.info("context %d pid %d: %s", channel.context.cid, channel.owner.pid, refused)
            channel.send(Record(refused.errno).encode())
            consume(channel.sock, channel.kind, request.polling)
            return True  # the program may try again on the same socket
        except ProtocolError as error:
            log.info("context %d pid %d: %s", channel.context.cid, channel.owner.pid, error)
            return False
        except OSError as error:  # the kernel's no to something the fabric allowed
            log.error("context %d pid %d: %s", channel.context.cid, channel.owner.pid, error)
            channel.send(Record(error.errno or errno.EIO).encode())
            return False
        except Exception:  # a mistake of ours; the program is not served again and again
            log.exception("context %d pid %d: request lost", channel.context.cid, channel.owner.pid)
            return False

    def _answer(self, channel: Channel, request: Request, record: bytes) -> None:
        channel.send(record)
        if request.flags or channel.kind is Kind.SEQPACKET:
            consume(channel.sock, channel.kind, request.polling)

    def _bind(self, channel: Channel, request: Request) -> bool:
        if channel.endpoint is not None:
            raise Refused(errno.EINVAL, "the socket is bound")
        endpoint = self._claim(channel, channel.kind, request, request.cookie)
        endpoint.handle = channel
        endpoint.sizes = request.sizes
        channel.endpoint = endpoint
        self._answer(channel, request, _describe_endpoint(endpoint))
        return True

    def _listen(self, channel: Channel, request: Request) -> bool:
        if channel.endpoint is None:
            raise Refused(errno.EINVAL, "the socket is not bound")
        again = channel.endpoint.listening
        channel.prepare_backlog(request.backlog)
        self.fabric.listen(channel.endpoint, request.sizes)
        record = _describe_endpoint(channel.endpoint)
        if again:  # the answer would be taken for a new connection
            consume(channel.sock, channel.kind, request.polling)
        else:
            self._answer(channel, request, record)
        return True

    def _update(self, channel: Channel, request: Request) -> bool:
        if channel.endpoint is not None:
            channel.endpoint.sizes = request.sizes
        consume(channel.sock, channel.kind, request.polling)
        return True

    def _connect(self, channel: Channel, request: Request) -> bool:
        bound = channel.endpoint
        if bound is not None and bound.listening:
            raise ProtocolError("a listening socket asked to connect")
        fabric, context, sock = self.fabric, channel.context, channel.sock
        listener = fabric.find_listener(context, channel.kind, request.peer_cid, request.peer_port)
        target = listener.handle
        assert isinstance(target, Channel)
        if not target.has_room():
            raise Refused(errno.ECONNRESET, f"the backlog of {listener.address} is full")
        connection = fabric.connect(
            context, listener, bound, request.sizes, channel.owner, request.cookie
        )
        if bound is not None:
            channel.endpoint = None
        fd = sock.fileno()
        if connection.size != DEFAULT_BUFFER_SIZE:
            sock.setsockopt(SOL_SOCKET, SO_SNDBUF, min(connection.size, LARGEST_SEND_BUFFER))
        self._streams.add(fd, connection.number)
        # The answer goes first: once the listener has the descriptor it may write.
        self._answer(channel, request, _describe_connecting(connection))
        try:
            target.announce(_describe_accepting(connection), fd)
        except OSError as error:
            log.warning("connection to %s lost: %s", listener.address, error)
            fabric.end(connection.number)
        self._reap_sometimes()
        return False

    def _bind_datagram(self, channel: Channel, request: Request) -> bool:
        sock = self._datagram_socket(channel)
        with closing(sock):
            if self.datagrams.find(channel.context, cookie_of(sock)) is not None:
                raise Refused(errno.EINVAL, "the datagram socket is bound")
            endpoint = self._adopt(channel, request, sock)
        channel.send(_describe_endpoint(endpoint))
        return False

    def _route(self, channel: Channel, request: Request) -> bool:
        sock = self._datagram_socket(channel)
        with closing(sock):
            destination = self.fabric.find_datagram(
                channel.context, request.peer_cid, request.peer_port
            )
            source = self.datagrams.find(channel.context, cookie_of(sock))
            if source is None:
                source = self._adopt(channel, request, sock)
        route = self.datagrams.route(source, destination)
        channel.send_descriptor(
            Record(
                0, 0, *source.address, *destination.address, Role.DATAGRAM, *destination.owner
            ).encode(),
            route.fileno(),
        )
        return False

    def _query(self, channel: Channel, request: Request) -> bool:
        self._answer(channel, request, self._look_up(channel, request))
        return False

    def _local_cid(self, channel: Channel, request: Request) -> bool:
        record = Record(0, self._trust(channel), channel.context.cid)
        self._answer(channel, request, record.encode())
        return False

    # Parts of them

    def _claim(self, channel: Channel, kind: Kind, request: Request, cookie: int = 0) -> Endpoint:
        def may_reserve() -> bool:
            return has_capability(channel.sock, CAP_NET_BIND_SERVICE)

        arguments = (
            channel.context,
            kind,
            request.local_cid,
            request.local_port,
            channel.owner,
            may_reserve,
            cookie,
        )
        try:
            return self.fabric.bind(*arguments)
        except Refused as refused:
            if refused.errno != errno.EADDRINUSE:
                raise
        # Held, as far as is known: ask the kernel whether its holder is still there.
        self.reap()
        ports = channel.context.datagrams if kind is Kind.DATAGRAM else channel.context.connected
        holder = ports.get(request.local_port)
        if isinstance(holder, Endpoint) and holder.kind is Kind.DATAGRAM:
            self.datagrams.is_open(holder)
        return self.fabric.bind(*arguments)

    def _adopt(self, channel: Channel, request: Request, sock: _socket.socket) -> Endpoint:
        endpoint = self._claim(channel, Kind.DATAGRAM, request)
        try:
            self.datagrams.adopt(endpoint, sock)
        except Refused:
            self.fabric.unbind(endpoint)
            raise
        return endpoint

    @staticmethod
    def _datagram_socket(channel: Channel) -> _socket.socket:
        """Take the request off the channel, and the datagram socket that rides along."""
        if channel.kind is not Kind.SEQPACKET:
            raise ProtocolError("a datagram request on a stream")
        fd = receive_with_descriptor(channel.sock)
        if fd is None:
            raise ProtocolError("a datagram request without a descriptor")
        try:
            sock = _socket.socket(fileno=fd)
        except OSError:
            dispose(fd)
            raise ProtocolError("a datagram request with something that is no socket") from None
        if (sock.family, sock.type) != (AF_UNIX, SOCK_DGRAM):
            dispose(sock.detach())
            raise ProtocolError(f"a datagram request with a socket of {sock.family=} {sock.type=}")
        return sock

    def _look_up(self, channel: Channel, request: Request) -> bytes:
        context = channel.context
        found = context.cookies.get(request.cookie) or self.datagrams.find(context, request.cookie)
        if isinstance(found, Connection):
            return _describe_connecting(found)
        if isinstance(found, Endpoint):
            return _describe_endpoint(found)
        if request.inode:
            for number, inode in self._streams.present().items():
                accepted = self.fabric.connections.get(number)
                if inode == request.inode and accepted and accepted.peer_context is context:
                    return _describe_accepting(accepted)
        raise Refused(errno.ENOTCONN, "an unknown socket was asked for")

    def _trust(self, channel: Channel) -> int:
        trusted = channel.owner.uid == channel.context.owner or has_capability(
            channel.sock, CAP_NET_ADMIN
        )
        return Flag.TRUSTED if trusted else 0

    # Streams that have ended

    def reap(self) -> None:
        """Forget every stream that has ended, as of now."""
        self._reap_hung_up()
        if self.fabric.connections:
            present = self._streams.present()
            for number in [n for n in self.fabric.connections if n not in present]:
                self.fabric.end(number)

    def _reap_hung_up(self) -> None:
        self._unreaped = 0
        for number in self._streams.hung_up():
            self.fabric.end(number)

    def _reap_sometimes(self) -> None:
        self._unreaped += 1
        if self._unreaped >= _REAP_EVERY:
            self._reap_hung_up()
        if self._reap_delay is None:
            self._reap_delay = _REAP_AFTER
            self._loop.call_later(_REAP_AFTER, self._reap_later)
        else:
            self._reap_delay = _REAP_AFTER

    def _reap_later(self) -> None:
        assert self._reap_delay is not None
        self.reap()
        if self.fabric.connections:
            self._loop.call_later(self._reap_delay, self._reap_later)
            self._reap_delay = min(self._reap_delay * 2, _REAP_AT_THE_LATEST)
        else:
            self._reap_delay = None


def _describe_endpoint(endpoint: Endpoint) -> bytes:
    role = Role.BOUND
    if endpoint.kind is Kind.DATAGRAM:
        role = Role.DATAGRAM
    elif endpoint.listening:
        role = Role.LISTENING
    return Record(
        0,
        0,
        *endpoint.address,
        VMADDR_CID_ANY,
        VMADDR_PORT_ANY,
        role,
        *endpoint.owner,
        *endpoint.sizes,
    ).encode()


def _describe_connecting(stream: Connection) -> bytes:
    """A stream as its connecting side sees it."""
    return encode_stream(
        stream.local, stream.peer, stream.listener.owner, stream.size, stream.sizes
    )


def _describe_accepting(stream: Connection) -> bytes:
    """A stream as its accepting side sees it."""
    return encode_stream(
        stream.peer, stream.local, stream.owner, stream.size, stream.listener.sizes
    )
