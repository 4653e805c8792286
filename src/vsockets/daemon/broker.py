"""Serving requests: the fabric decides, this moves the descriptors."""

from __future__ import annotations

import _socket
import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count
from socket import (
    AF_UNIX,
    SO_SNDBUF,
    SOCK_DGRAM,
    SOCK_SEQPACKET,
    SOCK_STREAM,
    SOL_SOCKET,
)
from time import monotonic
from typing import Any

from .. import logs
from ..constants import VMADDR_PORT_ANY
from ..fabric import Context, Denied, Endpoint, Fabric, Kind, Refused
from ..limits import (
    DEFAULT_BUFFER_SIZE,
    LARGEST_SEND_BUFFER,
    SILENT_CLIENT,
    SWEEP_AFTER,
    SWEEP_AT_THE_LATEST,
)
from ..wire import Flag, Op, ProtocolError, Record, Request, Role
from . import reserve
from .allowance import Allowance
from .audit import OPERATIONS, Audit
from .capturing import capture
from .channel import Channel, consume, take_socket
from .credentials import peer_credentials
from .datagrams import Datagrams
from .descriptions import (
    describe_accepting,
    describe_connecting,
    describe_endpoint,
    describe_offer,
)
from .kernel_link import KernelLink
from .listeners import AnnouncedListener, Listener, NamedListener
from .loop import Loop
from .named import NamedSocket, bind_to_name, cookie_of, probe_of
from .questions import Questions
from .streams import Streams

log = logging.getLogger(__name__)

# Names of our own: looking a member up in its enum costs as much as a short function.
_STREAM, _SEQPACKET = Kind.STREAM, Kind.SEQPACKET
_UNPRIVILEGED = int(Flag.UNPRIVILEGED)
#: Why a listener can be sent no connection again: it was shut down (SHUT_RD), or closed.
_DEAF = (errno.EPIPE, errno.ECONNRESET, errno.ECONNREFUSED)


class Broker:
    """Every request of every program, a method for each operation.

    An operation returns whether vsockd goes on holding the channel.
    """

    def __init__(self, loop: Loop, fabric: Fabric, audit: Audit) -> None:
        self.fabric = fabric
        self.datagrams = Datagrams(loop, fabric)
        self._audit = audit
        self._loop = loop
        self.streams = Streams(loop, fabric)
        self._questions = Questions(fabric, self.streams, self.datagrams)
        self._channels: dict[Context, set[Channel]] = {}
        #: those that hold sockets with names, by their secrets
        self._holders: dict[int, Channel] = {}
        self._names = count(1)
        self._sweep_delay: float | None = None  # None: no timer is set
        for type_ in (SOCK_STREAM, SOCK_DGRAM):  # so that vsockd has as many descriptors always
            probe_of(int(type_))
        #: silent ones that take the reserve's place, the longest first
        self._brief: dict[Channel, None] = {}
        self._allowance = Allowance(self.refresh, self._listening)
        self._operations: dict[int, Callable[[Channel, Request], bool]] = {
            Op.BIND: self._bind,
            Op.LISTEN: self._listen,
            Op.CONNECT: self._connect,
            Op.UPDATE: self._update,
            Op.BIND_DATAGRAM: self._bind_datagram,
            Op.ROUTE: self._route,
            Op.QUERY: self._query,
            Op.LOCAL_CID: self._local_cid,
            Op.CATCH_ALL: self._catch_all,
            Op.CAPTURE: self._capture,
            Op.RESIZE: self._resize,
            Op.BIND_SOCKET: self._bind_socket,
        }

    def refresh(self) -> None:
        """Forget every socket that has gone, as of now."""
        self.streams.reap()
        self.datagrams.sweep()
        self._sweep_holders()

    def count_waiting(self) -> None:
        """Find out which connections have been accepted, as of now: nobody says so."""
        self._allowance.count_waiting()

    # Channels

    def admit(self, context: Context, kind: Kind, fd: int) -> None:
        """Take a connection ``fd`` just accepted on ``context``'s control socket."""
        sock_type = SOCK_STREAM if kind is _STREAM else SOCK_SEQPACKET
        sock = _socket.socket(AF_UNIX, sock_type, 0, fd)
        self.take(Channel(sock, context, kind, peer_credentials(sock)))

    def take(self, channel: Channel) -> None:
        """Serve what is said on a new channel."""
        try:
            data = channel.read()
        except BlockingIOError:
            # A program connects and then writes, and may have been interrupted in between, by
            # us.  Letting it run is cheaper than coming back to it.
            os.sched_yield()
            try:
                data = channel.read()
            except BlockingIOError:
                self._await_request(channel)
                return
        if data and self._serve(channel, data):
            self._keep(channel)
        elif channel.endpoint is None:
            channel.sock.close()
        else:
            self._drop(channel)

    def resume(self, channel: Channel) -> None:
        """Go on serving one that a device has refused; see :mod:`.offers`."""
        if channel.endpoint is not None:
            self.fabric.rebind(channel.endpoint)
        if self._may_ask_again(channel):
            channel.expect_requests(True)  # the device may have ended that
            self._keep(channel)
        else:
            self._drop(channel)

    def close_context(self, context: Context) -> None:
        """Let go of everything in a context that is no more; its streams have been cut."""
        for channel in list(self._channels.get(context, ())):
            self._drop(channel)
        self._channels.pop(context, None)
        if context.kernel is not None:
            assert isinstance(context.kernel.streams, KernelLink)
            context.kernel.streams.close()
        self.datagrams.close_context(context)

    def _listening(self) -> Iterator[Listener]:
        for channels in self._channels.values():
            for channel in channels:
                if channel.listener is not None and channel.listener.is_listening:
                    yield channel.listener

    def _await_request(self, channel: Channel) -> None:
        """Keep a channel whose program has connected and said nothing."""
        try:
            self._allowance.require_patience(channel.party)
        except Denied as denied:
            channel.context.counts.refusals += 1
            source = channel.context.cid, VMADDR_PORT_ANY
            self._audit.record(
                channel.context, channel, denied, "a silent connection", source, None
            )
            channel.send(Record(denied.errno).encode())
            channel.sock.close()
            return
        channel.silent = True
        channel.party.pending += 1
        self._keep(channel)
        self._loop.call_later(SILENT_CLIENT, lambda: self._close_if_silent(channel))
        if not reserve.may_stay(channel.sock.fileno()):
            # A program that means well says something within microseconds.
            self._brief[channel] = None
            if len(self._brief) > reserve.most_brief():
                longest = next(iter(self._brief))
                longest.send(Record(errno.ENOBUFS).encode())
                self._drop(longest)

    def _keep(self, channel: Channel) -> None:
        self._channels.setdefault(channel.context, set()).add(channel)
        channel.party.channels += 1
        self._loop.watch(channel.sock.fileno(), lambda events: self._ready(channel))

    def _ready(self, channel: Channel) -> None:
        try:
            data = channel.read()
        except BlockingIOError:
            return
        self._has_spoken(channel)
        if not (data and self._serve(channel, data)):
            self._drop(channel)

    def _may_ask_again(self, channel: Channel) -> bool:
        """After a refusal the program may try again on the same socket, and one that is bound
        stays so; unless it has very many that are not.
        """
        if channel.asks_once:
            return False
        if channel.endpoint is not None:
            return True
        limits = channel.party.limits
        room = limits is None or channel.party.channels < limits.sockets
        return room and reserve.may_stay(channel.sock.fileno())

    def _drop(self, channel: Channel) -> None:
        self._loop.unwatch(channel.sock.fileno())
        kept = self._channels.get(channel.context)
        if kept is not None and channel in kept:
            kept.remove(channel)
            channel.party.channels -= 1
        self._has_spoken(channel)
        if channel.listener is not None:
            channel.listener.close()
            self._holders.pop(channel.secret, None)
        if channel.endpoint is not None:
            self.fabric.unbind(channel.endpoint)
        channel.sock.close()

    def _sweep_holders(self) -> None:
        """Drop the holders of sockets that have been closed: the kernel does not say when."""
        for channel in list(self._holders.values()):
            self._drop_if_closed(channel.listener)

    def _drop_if_closed(self, target: object) -> None:
        if isinstance(target, Listener) and not target.is_open():
            target.channel.send(Record(errno.EBADF).encode())  # not that vsockd has ended
            self._drop(target.channel)

    def _sweep_later(self) -> None:
        if self._sweep_delay is None:
            self._loop.call_later(SWEEP_AFTER, self._sweep_again)
        self._sweep_delay = SWEEP_AFTER

    def _sweep_again(self) -> None:
        assert self._sweep_delay is not None
        self._sweep_holders()
        if self._holders:
            self._loop.call_later(self._sweep_delay, self._sweep_again)
            self._sweep_delay = min(self._sweep_delay * 2, SWEEP_AT_THE_LATEST)
        else:
            self._sweep_delay = None

    def _has_spoken(self, channel: Channel) -> None:
        if channel.silent:
            channel.silent = False
            channel.party.pending -= 1
            self._brief.pop(channel, None)

    def _close_if_silent(self, channel: Channel) -> None:
        if channel.silent and channel in self._channels.get(channel.context, ()):
            pid = channel.credentials.pid
            log.debug("pid %d connected and said nothing", pid, extra=logs.by(channel.party))
            self._drop(channel)

    # Requests

    def _serve(self, channel: Channel, data: bytes) -> bool:
        context = channel.context
        try:
            request = Request.decode(data)
            operation = self._operations.get(request.op)
            if operation is None:
                raise ProtocolError(f"no operation {request.op}")
            if channel.party.limits is not None:
                channel.party.require_pace(monotonic())
            return operation(channel, request)
        except Refused as refused:
            context.counts.refusals += 1
            if isinstance(refused, Denied):
                self._record(channel, request, refused)
            else:
                self._log(logging.INFO, channel, refused)
            channel.send(Record(refused.errno).encode())
            consume(channel.sock, channel.kind, request.polling)
            return self._may_ask_again(channel)
        except ProtocolError as error:
            self._log(logging.INFO, channel, error)
            return False
        except OSError as error:  # the kernel's no to something the fabric allowed
            self._log(logging.ERROR, channel, error)
            channel.send(Record(error.errno or errno.EIO).encode())
            return False
        except Exception as error:  # a mistake of ours; the program is not served again and again
            self._log(logging.ERROR, channel, "request lost", error)
            return False

    @staticmethod
    def _log(level: int, channel: Channel, what: object, error: Exception | None = None) -> None:
        """Log what became of a request, with a traceback of ``error``."""
        if log.isEnabledFor(level):
            cid, pid = channel.context.cid, channel.credentials.pid
            extra = logs.by(channel.party)
            log.log(level, "context %d pid %d: %s", cid, pid, what, exc_info=error, extra=extra)

    def _record(self, channel: Channel, request: Request, denied: Denied) -> None:
        """Write a denial down."""
        operation = Op(request.op)
        source, destination = (channel.context.cid, VMADDR_PORT_ANY), None
        if operation in (Op.BIND, Op.BIND_DATAGRAM, Op.BIND_SOCKET):
            source = request.local_cid, request.local_port
        elif (own := channel.endpoint or channel.sender) is not None:
            source = own.address
        if operation in (Op.CONNECT, Op.ROUTE, Op.CAPTURE):
            destination = request.peer_cid, request.peer_port
        self._audit.record(
            channel.context,
            channel,
            denied,
            OPERATIONS[operation],
            source,
            destination,
        )

    def _answer(self, channel: Channel, request: Request, record: bytes) -> None:
        channel.send(record)
        if request.flags or channel.kind is _SEQPACKET:
            consume(channel.sock, channel.kind, request.polling)

    def _bind(self, channel: Channel, request: Request) -> bool:
        if channel.endpoint is not None:
            raise Refused(errno.EINVAL, "the socket is bound")
        reserve.require_free(channel.sock.fileno())
        endpoint = self._claim(channel, channel.kind, request, request.cookie)
        endpoint.sizes = request.sizes()
        channel.endpoint = endpoint
        self._answer(channel, request, describe_endpoint(endpoint))
        return True

    def _bind_socket(self, channel: Channel, request: Request) -> bool:
        sock = take_socket(channel, SOCK_STREAM, SOCK_SEQPACKET)
        with closing(sock):
            if not request.cookie or self._holders.get(request.cookie, channel) is not channel:
                raise ProtocolError("a secret that is not one")
            reserve.require_free(sock.fileno())
            moved = channel.moved
            if moved is not None and channel.endpoint is None:  # it comes back from there
                channel.endpoint, moved.endpoint = moved.endpoint, None
            endpoint, listener = channel.endpoint, channel.listener
            if endpoint is None:
                kind = _STREAM if sock.type == SOCK_STREAM else _SEQPACKET
                endpoint = self._claim(channel, kind, request)
                endpoint.sizes = request.sizes()
            try:
                name = f"{self.datagrams.life}.stream.{next(self._names)}"
                named = NamedSocket(name, bind_to_name(sock, name))
            except BaseException:
                if channel.endpoint is None:
                    self.fabric.unbind(endpoint)
                raise
            channel.endpoint = endpoint
            if listener is None:
                listener = channel.listener = NamedListener(channel, named, sock.type)
                channel.secret = request.cookie
                self._holders[channel.secret] = channel
                self._sweep_later()
            else:
                assert isinstance(listener, NamedListener)
                listener.replace(named, sock.type)
            endpoint.handle = listener
            self.fabric.rename(endpoint, cookie_of(sock), os.fstat(sock.fileno()).st_ino)
        channel.send(describe_endpoint(endpoint))
        return True

    def _listen(self, channel: Channel, request: Request) -> bool:
        if channel.endpoint is None:
            raise Refused(errno.EINVAL, "the socket is not bound")
        # Where connections are announced the answer would be taken for one.
        silent = channel.endpoint.listening and isinstance(channel.listener, AnnouncedListener)
        if channel.listener is None:
            channel.listener = channel.endpoint.handle = AnnouncedListener(channel)
        channel.listener.prepare(request.backlog)
        self.fabric.listen(channel.endpoint, request.sizes())
        record = describe_endpoint(channel.endpoint)
        if silent:
            consume(channel.sock, channel.kind, request.polling)
        else:
            self._answer(channel, request, record)
        return True

    def _update(self, channel: Channel, request: Request) -> bool:
        if channel.endpoint is not None:
            channel.endpoint.sizes = request.sizes()
        consume(channel.sock, channel.kind, request.polling)
        return True

    def _connect(self, channel: Channel, request: Request) -> bool:
        if request.inode:
            self._move(channel, request.inode)
        bound = channel.endpoint
        if bound is not None and bound.listening:
            raise ProtocolError("a listening socket asked to connect")
        fabric, context, sock = self.fabric, channel.context, channel.sock
        if channel.is_kernel:
            bound = channel.endpoint = self._claim(channel, channel.kind, request)
        asker = channel.asker
        listener = fabric.find_listener(
            context, channel.kind, request.peer_cid, request.peer_port, asker, bound
        )
        target: Any = listener.handle  # a Listener or an OfferLink
        if channel.party.is_at_a_limit():
            self._allowance.require_patience(channel.party, target.count_waiting)
            self._allowance.make_room(channel.party)
        if channel.lent_to not in (None, target):
            # Who has had it could have kept it, and would be in the middle of this stream.
            raise Refused(errno.ECONNRESET, "the socket was refused elsewhere: make another")
        if not target.has_room():
            self._drop_if_closed(target)
            raise Refused(errno.ECONNRESET, f"the backlog of {listener.address} is full")
        connection = fabric.connect(
            context, listener, bound, request.sizes(), asker.credentials, request.cookie
        )
        if bound is not None and not listener.undecided:
            channel.endpoint = None
        fd = sock.fileno()
        if connection.size != DEFAULT_BUFFER_SIZE and not listener.undecided:
            sock.setsockopt(SOL_SOCKET, SO_SNDBUF, min(connection.size, LARGEST_SEND_BUFFER))
        if listener.undecided:
            self.streams.lend(fd, connection.number)
            accepting = describe_offer(connection, channel.offer_flags, request.polling)
        else:
            self.streams.add(fd, connection.number)
            # The answer goes first: once the listener has the descriptor it may write.
            channel.send(describe_connecting(connection))
            if request.flags or channel.kind is _SEQPACKET:
                consume(sock, channel.kind, request.polling)
            accepting = describe_accepting(connection)
            if not channel.is_kernel:
                channel.expect_requests(False)
        try:
            target.announce(accepting, channel)
        except OSError as error:
            reason = f"connection to {listener.address} lost: {error}"
            self._log(logging.WARNING, channel, reason)
            fabric.end(connection.number)
            if error.errno in _DEAF and isinstance(target, Listener):
                target.channel.send(Record(errno.EBADF).encode())
                self._drop(target.channel)
            if listener.undecided:
                self._answer(channel, request, Record(errno.ECONNRESET).encode())
        if channel.is_kernel:
            self._questions.welcome(connection)
        self.streams.reap_sometimes()
        return False

    def _move(self, channel: Channel, secret: int) -> None:
        """Let ``channel`` have the endpoint of a socket with a name: it is the socket's own."""
        holder = self._holders.get(secret)
        if holder is not None and holder.moved is channel and channel.endpoint is not None:
            return  # with an earlier connect, which was refused
        if holder is None or holder.context is not channel.context or holder.endpoint is None:
            raise Refused(errno.EINVAL, "the socket is not bound")
        if holder.endpoint.listening or channel.endpoint is not None:
            raise ProtocolError("a socket that cannot be connected asked to connect")
        channel.endpoint, holder.endpoint = holder.endpoint, None
        holder.moved = channel

    def _bind_datagram(self, channel: Channel, request: Request) -> bool:
        sock = take_socket(channel, SOCK_DGRAM)
        with closing(sock):
            reserve.require_free(sock.fileno())
            if self.datagrams.find_socket(channel.context, sock) is not None:
                raise Refused(errno.EINVAL, "the datagram socket is bound")
            endpoint = self._adopt(channel, request, sock)
        channel.send(describe_endpoint(endpoint))
        return False

    def _route(self, channel: Channel, request: Request) -> bool:
        sock = take_socket(channel, SOCK_DGRAM)
        with closing(sock):
            reserve.require_free(sock.fileno())
            source = channel.sender = self.datagrams.find_socket(channel.context, sock)
            asker = channel.asker
            wanted = (channel.context, request.peer_cid, request.peer_port, asker)
            destination = self.fabric.find_datagram(*wanted, source)
            if source is None:
                source = self._adopt(channel, request, sock)
                # Again: the destination may have been found gone since, or may be out of the
                # reach of where the socket is bound now.
                destination = self.fabric.find_datagram(*wanted, source)
        route = self.datagrams.route(source, destination)
        channel.send_descriptor(
            Record(
                0, 0, *source.address, *destination.address, Role.DATAGRAM, *destination.owner
            ).encode(),
            route.fileno(),
        )
        return False

    def _catch_all(self, channel: Channel, request: Request) -> bool:
        if not channel.is_kernel:
            raise ProtocolError("a program asked for all datagrams of its context")
        kernel = channel.context.kernel
        assert kernel is not None and isinstance(kernel.streams, KernelLink)
        sock = take_socket(channel, SOCK_DGRAM)
        with closing(sock):
            datagrams = self.datagrams.catch_all(channel.context, sock)
            kernel.streams.catches(datagrams)
        channel.send(Record(0).encode())
        return False

    def _capture(self, channel: Channel, request: Request) -> bool:
        with closing(capture(self.fabric, channel, request)) as records:
            consume(channel.sock, channel.kind, request.polling)
            channel.send_descriptor(Record(0).encode(), records.fileno())
        return False

    def _query(self, channel: Channel, request: Request) -> bool:
        self._answer(channel, request, self._questions.look_up(channel, request))
        return False

    def _resize(self, channel: Channel, request: Request) -> bool:
        self._questions.resize(channel, request)
        self._answer(channel, request, Record(0).encode())
        return False

    def _local_cid(self, channel: Channel, request: Request) -> bool:
        record = Record(0, self._questions.trust(channel, request), channel.context.cid)
        self._answer(channel, request, record.encode())
        return False

    # Parts of them

    def _claim(self, channel: Channel, kind: Kind, request: Request, cookie: int = 0) -> Endpoint:
        self._allowance.make_room(channel.party)
        privileged = not request.flags & _UNPRIVILEGED
        address = request.local_cid, request.local_port
        asker = channel.asker
        arguments = (channel.context, kind, *address, asker, cookie, privileged)
        try:
            return self.fabric.bind(*arguments)
        except Refused as refused:
            if refused.errno != errno.EADDRINUSE:
                raise
        # Held, as far as is known: ask the kernel whether its holder is still there.
        self.streams.reap()
        ports = channel.context.datagrams if kind is Kind.DATAGRAM else channel.context.connected
        holder = ports.get(request.local_port)
        if isinstance(holder, Endpoint) and holder.kind is Kind.DATAGRAM:
            self.datagrams.is_open(holder)
        elif isinstance(holder, Endpoint):
            self._drop_if_closed(holder.handle)
        return self.fabric.bind(*arguments)

    def _adopt(self, channel: Channel, request: Request, sock: _socket.socket) -> Endpoint:
        endpoint = self._claim(channel, Kind.DATAGRAM, request)
        try:
            self.datagrams.adopt(endpoint, sock)
        except Refused:
            self.fabric.unbind(endpoint)
            raise
        return endpoint
