"""Requests of clients: the fabric decides about them, the broker moves the descriptors."""

from __future__ import annotations

import _socket
import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count, islice
from socket import (
    AF_UNIX,
    SO_SNDBUF,
    SOCK_DGRAM,
    SOCK_SEQPACKET,
    SOCK_STREAM,
    SOL_SOCKET,
)
from time import monotonic

from .. import logs
from .._linux.sockets import cookie_of, refuse_descriptors
from ..eventloop.loop import EventLoop
from ..fabric import Connection, Context, Denied, Endpoint, EndpointKind, Fabric, Party, Refused
from ..limits import SEND_BUFFER_MAX_BYTES, STREAM_BUFFER_DEFAULT_BYTES
from ..model.buffers import BufferSizes
from ..model.constants import VMADDR_PORT_ANY
from ..protocol import Op, ProtocolError, Record, Request, RequestFlag, Role
from .admin.audit import OPERATIONS, Audit
from .channel import SHORTAGE, Channel, Listener, consume, take_socket
from .credentials import peer_credentials
from .datagrams import Datagrams
from .device_link import HandoffLink, capture
from .handover import Reader, Saved, Writer
from .in_flight import InFlight, Step
from .journal import Journal
from .limit_checks import (
    LimitChecks,
    max_silent_descriptors,
    may_keep_descriptor,
    require_unreserved,
)
from .limits import (
    DAEMON_PROBES_PER_STEP,
    DAEMON_SILENT_CLIENT_SECONDS,
    DAEMON_SWEEP_FIRST_SECONDS,
    DAEMON_SWEEP_LONGEST_SECONDS,
    DAEMON_UNREAD_REPLIES_MAX,
)
from .listeners import (
    AnnouncedListener,
    NamedListener,
    Unannounced,
    encode_accepting,
    encode_connecting,
    encode_endpoint,
    encode_offer,
    leaves_replies_unread,
    restore_listener,
)
from .named_sockets import NamedSocket, bind_to_name, probe_of
from .scheduling import DeferredWork, RequestTurns, pause_for
from .socket_queries import SocketQueries
from .streams import Streams

log = logging.getLogger(__name__)

# Module aliases of enum members: hot path.
_STREAM, _SEQPACKET = EndpointKind.STREAM, EndpointKind.SEQPACKET
_UNPRIVILEGED, _POLLING = int(RequestFlag.UNPRIVILEGED), int(RequestFlag.POLLING)
_ANNOUNCE = Step.ANNOUNCE
# What a named tuple's __new__, which is a function in Python, calls.
_new = tuple.__new__
#: Owners of named sockets to probe at once for a party that is at its limit.
_HOLDERS_PROBED = 16


class Broker:
    """The requests of all clients, with one method for each operation.

    An operation returns whether vsockd keeps the channel open.
    """

    def __init__(
        self, loop: EventLoop, fabric: Fabric, audit: Audit, in_flight: InFlight | None = None
    ) -> None:
        self.fabric = fabric
        self.deferred = DeferredWork(loop)
        self._turns = RequestTurns(loop)
        self.datagrams = Datagrams(loop, fabric, self.deferred)
        self._audit = audit
        self._loop = loop
        self.streams = Streams(loop, fabric, self.deferred)
        self.queries = SocketQueries(fabric, self.streams, self.datagrams)
        self._channels: dict[Context, set[Channel]] = {}
        #: channels that hold named sockets, by secret; the one probed longest ago comes first
        self._holders: dict[int, Channel] = {}
        self._names = count(1)
        self._sweep_delay: float | None = None  # None: no timer is set
        for type_ in (SOCK_STREAM, SOCK_DGRAM):  # now, so that vsockd's descriptor count is fixed
            probe_of(int(type_))
        #: channels without a request yet, and the time each is closed, in order of that time
        self._silent: dict[Channel, float] = {}
        self._unannounced = Unannounced(loop, self._drop_listener, self.record_channel)
        #: channels without a request that use up the reserve, the oldest first
        self._silent_in_reserve: dict[Channel, None] = {}
        self._limit_checks = LimitChecks(self._release_some)
        self.journal: Journal | None = None
        self.in_flight = Channel.in_flight = in_flight
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
            Op.COUNT: self._count,
        }

    def save(self, writer: Writer) -> Saved:
        """Return the state of streams and channels; the caller saves what they refer to."""
        return {
            "streams": self.streams.save(writer),
            "kept": [writer.channel(one) for kept in self._channels.values() for one in kept],
            "holders": [(secret, writer.channel(one)) for secret, one in self._holders.items()],
            "names": next(self._names),
        }

    def restore(self, reader: Reader, saved: Saved, channels: dict[int, Saved]) -> None:
        """Serve the channels that the previous vsockd has saved; ``channels`` has their rows."""
        self._names = count(saved["names"])
        for number in channels.keys() & saved["kept"]:
            self.restore_channel(reader, reader.channels[number], channels[number])
        self._holders = {secret: reader.channels[number] for secret, number in saved["holders"]}
        if self._holders:
            self._sweep_later()
        self._unannounced.retry_later()

    def restore_channel(self, reader: Reader, channel: Channel, saved: Saved) -> None:
        """Serve a channel with the state that the previous vsockd has saved."""
        if saved["listener"] is not None:
            listener = restore_listener(reader, channel, saved["listener"])
            if listener.has_held:
                self._unannounced.targets[listener] = None
        if saved["silent"]:
            self._begin_silence(channel)
        elif channel not in self._channels.get(channel.context, ()):
            self._keep(channel)

    def keep_journal(self, journal: Journal) -> None:
        """Record in ``journal`` all changes from now on, before clients get replies."""
        self.journal = journal
        self.streams.keep_journal(journal)
        self.datagrams.keep_journal(journal)

    def find_kept(self, fd: int) -> Channel | None:
        """Return the channel that is kept with this descriptor, or None."""
        kept = (one for channels in self._channels.values() for one in channels)
        return next((one for one in kept if one.sock.fileno() == fd), None)

    def refresh(self) -> Iterator[None]:
        """Release every socket that has been closed, in steps."""
        yield from self.streams.reap_in_steps()
        yield from self.datagrams.sweep()
        yield from self._sweep_holders()

    # Channels

    def admit(self, context: Context, kind: EndpointKind, fd: int) -> float:
        """Admit connection ``fd``, just accepted on a control socket of ``context``.

        Returns the seconds until the next one may be accepted.
        """
        sock_type = SOCK_STREAM if kind is _STREAM else SOCK_SEQPACKET
        sock = _socket.socket(AF_UNIX, sock_type, 0, fd)
        channel = Channel(sock, context, kind, peer_credentials(sock))
        self.serve_first(channel)
        if not channel.party.blocked:
            return 0.0
        pause = pause_for(channel.party)
        # On the host's socket the next connection may be another user's.
        return pause if context.is_guest else 0.0

    def serve_first(self, channel: Channel, link: HandoffLink | None = None) -> None:
        """Serve the first request on a new channel, or keep the channel until it arrives.

        ``link`` is the link that the channel's descriptor has come over.
        """
        data: bytes | None
        try:
            data = channel.read()
        except BlockingIOError:
            # A client connects and then writes, and may have been preempted by vsockd in between.
            # Yielding the processor to it is cheaper than another round through the event loop.
            os.sched_yield()
            try:
                data = channel.read()
            except BlockingIOError:
                self._await_request(channel)
                data = None
        is_kept = data is None
        if data and (is_kept := self._serve(channel, data)):
            self._keep(channel)
        if link is not None:
            link.take()  # before the last close of its descriptor, which may block
        if not is_kept:
            if channel.endpoint is None:
                channel.close()
            else:
                self.drop(channel)
        if self.journal is not None:
            self.journal.end_request()

    def resume(self, channel: Channel) -> None:
        """Continue with a channel whose connection a device refused; see :mod:`.device_link`."""
        if channel.endpoint is not None:
            self.fabric.rebind(channel.endpoint)
        if channel.may_retry():
            channel.receive_credentials(True)  # the device may have cleared SO_PASSCRED
            self._keep(channel)
        else:
            self.drop(channel)

    def close_context(self, context: Context) -> None:
        """Release everything in a closed context, whose streams have been disconnected."""
        for channel in list(self._channels.get(context, ())):
            self.drop(channel)
        self._channels.pop(context, None)
        if context.device is not None:
            context.device.streams.close()
        self.datagrams.close_context(context)

    def listening(self) -> Iterator[Listener]:
        """Yield every listening socket."""
        for channels in self._channels.values():
            for channel in channels:
                if channel.listener is not None and channel.listener.is_listening:
                    yield channel.listener

    def _await_request(self, channel: Channel) -> None:
        """Keep a channel whose client has connected and sent no request yet."""
        try:
            self._limit_checks.check_pending_limit(channel.party)
        except Denied as denied:
            context, what = channel.context, "a silent connection"
            self._count_refusal(context)
            self._audit.record(context, channel, denied, what, (context.cid, VMADDR_PORT_ANY), None)
            channel.send(Record(denied.errno).encode())
            channel.close()
            return
        self._begin_silence(channel)
        if channel.silent and not may_keep_descriptor(channel.sock.fileno()):
            # A well-behaved client sends its request within microseconds.
            self._silent_in_reserve[channel] = None
            if len(self._silent_in_reserve) > max_silent_descriptors():
                longest = next(iter(self._silent_in_reserve))
                longest.send(Record(errno.ENOBUFS).encode())
                self.drop(longest)

    def _begin_silence(self, channel: Channel) -> None:
        channel.silent = True
        channel.party.pending += 1
        if not self._silent:
            self._loop.call_later(DAEMON_SILENT_CLIENT_SECONDS, self._close_silent)
        self._silent[channel] = monotonic() + DAEMON_SILENT_CLIENT_SECONDS
        self._keep(channel)

    def _keep(self, channel: Channel) -> None:
        """Serve further requests on a channel; close it if no descriptor or memory is left."""
        self._channels.setdefault(channel.context, set()).add(channel)
        self._note(channel)
        channel.party.channels += 1
        fd = channel.sock.fileno()
        try:
            self._turns.watch(channel.party, fd, lambda hung_up: self.serve_kept(channel, hung_up))
        except OSError as error:
            self._log(logging.WARNING, channel, f"connection closed: {error.strerror}")
            self.drop(channel)

    def serve_kept(self, channel: Channel, hung_up: bool = False) -> None:
        """Serve a request on a channel that is kept, or handle the channel's end."""
        if self.in_flight is not None:
            channel.begin(self.in_flight)
        self.continue_kept(channel, hung_up)

    def continue_kept(self, channel: Channel, hung_up: bool = False) -> None:
        """Serve, as :meth:`serve_kept` does, a request that a killed vsockd may have read."""
        try:
            # A client that has closed its connection may have left very many requests unread.
            data = b"" if hung_up else channel.read()
        except BlockingIOError:
            data = None
            if channel.has_part and self.journal is not None:
                self.journal.channel(channel)
                self.journal.commit(("done", channel.sock.fileno()))
        if data is not None:
            self._serve_read(channel, data)
        if self.journal is not None:
            self.journal.end_request()

    def _serve_read(self, channel: Channel, data: bytes) -> None:
        self._end_silence(channel)
        channel.requests += 1
        if channel.requests % DAEMON_UNREAD_REPLIES_MAX == 0 and leaves_replies_unread(channel):
            self._log(logging.INFO, channel, "closed: the client does not read its replies")
            data = b""
        if not (data and self._serve(channel, data)):
            self.drop(channel)

    def drop(self, channel: Channel) -> None:
        """Close a channel that is kept, and release its port."""
        self._turns.unwatch(channel.party, channel.sock.fileno())
        kept = self._channels.get(channel.context)
        if kept is not None and channel in kept:
            kept.remove(channel)
            channel.party.channels -= 1
        self._end_silence(channel)
        if channel.endpoint is not None:
            self.fabric.unbind(channel.endpoint)
            channel.endpoint.handle = None  # the endpoint is kept for its streams
        if (journal := self.journal) is not None:  # before descriptors are closed
            journal.dropped(channel)
        if channel.listener is not None:
            channel.listener.close()
            self._unannounced.targets.pop(channel.listener, None)
            self._holders.pop(channel.secret, None)
        channel.close()
        if journal is not None:
            journal.closed()

    def _release_some(self, party: Party | None = None) -> None:
        """Release some of what ``party`` (or every party) has closed; defer the rest."""
        self.streams.reap_some()
        self._probe_holders(_HOLDERS_PROBED)
        self.deferred.start(self, self._sweep_holders())
        if party is None:
            self.datagrams.start_sweep()
        else:
            self.datagrams.sweep_some(party)

    def _probe_holders(self, number: int) -> None:
        """Probe ``number`` named sockets; drop the channels of those that are closed."""
        for secret, channel in list(islice(self._holders.items(), number)):
            del self._holders[secret]
            self._holders[secret] = channel
            self._drop_if_closed(channel.listener)

    def _sweep_holders(self) -> Iterator[None]:
        for _ in range(0, len(self._holders), DAEMON_PROBES_PER_STEP):
            self._probe_holders(DAEMON_PROBES_PER_STEP)
            yield

    def _drop_if_closed(self, target: object) -> None:
        if isinstance(target, Channel) and target.has_hung_up():
            self.drop(target)
        elif isinstance(target, Listener) and not target.is_open():
            self._drop_listener(target)

    def _sweep_later(self) -> None:
        if self._sweep_delay is None:
            self._loop.call_later(DAEMON_SWEEP_FIRST_SECONDS, self._sweep_again)
        self._sweep_delay = DAEMON_SWEEP_FIRST_SECONDS

    def _sweep_again(self) -> None:
        assert self._sweep_delay is not None
        self.deferred.start(self, self._sweep_holders())
        if self._holders:
            self._loop.call_later(self._sweep_delay, self._sweep_again)
            self._sweep_delay = min(self._sweep_delay * 2, DAEMON_SWEEP_LONGEST_SECONDS)
        else:
            self._sweep_delay = None

    def _end_silence(self, channel: Channel) -> None:
        if channel.silent:
            channel.silent = False
            channel.party.pending -= 1
            self._note(channel)
            self._silent_in_reserve.pop(channel, None)
            del self._silent[channel]

    def _close_silent(self) -> None:
        now = monotonic()
        while self._silent:
            channel, end = next(iter(self._silent.items()))
            if end > now:
                self._loop.call_later(end - now, self._close_silent)
                return
            pid = channel.credentials.pid
            log.debug("pid %d connected and sent no request", pid, extra=logs.by(channel.party))
            self.drop(channel)

    # Requests

    def _serve(self, channel: Channel, data: bytes) -> bool:
        context = channel.context
        try:
            request = Request.decode(data)
            operation = self._operations.get(request.op)
            if operation is None:
                raise ProtocolError(f"unknown operation {request.op}")
            if channel.party.limits is not None:
                channel.party.check_rate(monotonic())
            return operation(channel, request)
        except Refused as refused:
            self._count_refusal(context)
            if isinstance(refused, Denied):
                self._record(channel, request, refused)
            else:
                self._log(logging.INFO, channel, refused)
            channel.send(Record(refused.errno).encode(), self.in_flight)
            consume(channel, request.polling)
            return channel.may_retry()
        except ProtocolError as error:
            self._log(logging.INFO, channel, error)
            return False
        except OSError as error:  # the kernel refused what the fabric allowed
            self._log(logging.ERROR, channel, error)
            channel.send(Record(error.errno or errno.EIO).encode(), self.in_flight)
            consume(channel, False)
            return False
        except Exception as error:  # a bug in vsockd; closing prevents an endless retry
            self._log(logging.ERROR, channel, "request lost", error)
            return False

    def _count_refusal(self, context: Context) -> None:
        context.counts.refusals += 1
        if self.journal is not None:
            self.journal.refused(context)

    @staticmethod
    def _log(level: int, channel: Channel, what: object, error: Exception | None = None) -> None:
        """Log the outcome of a request, with a traceback of ``error``."""
        if log.isEnabledFor(level):
            cid, pid = channel.context.cid, channel.credentials.pid
            extra = logs.by(channel.party)
            log.log(level, "context %d pid %d: %s", cid, pid, what, exc_info=error, extra=extra)

    def _record(self, channel: Channel, request: Request, denied: Denied) -> None:
        """Write a denial to the audit log."""
        operation = Op(request.op)
        source, destination = (channel.context.cid, VMADDR_PORT_ANY), None
        if operation in (Op.BIND, Op.BIND_DATAGRAM, Op.BIND_SOCKET):
            source = request.local_cid, request.local_port
        elif (own := channel.endpoint or channel.sender) is not None:
            source = own.address
        if operation in (Op.CONNECT, Op.ROUTE, Op.CAPTURE):
            destination = request.peer_cid, request.peer_port
        name = OPERATIONS[operation]
        self._audit.record(channel.context, channel, denied, name, source, destination)

    def _reply(self, channel: Channel, request: Request, record: bytes) -> None:
        """Send a reply, then consume the request."""
        if self.journal is not None:
            self.journal.commit(("reply", channel.sock.fileno(), record, request.polling))
        channel.send(record, self.in_flight)
        if request.flags or channel.kind is _SEQPACKET:
            consume(channel, request.polling)

    def _bind(self, channel: Channel, request: Request) -> bool:
        if channel.endpoint is not None:
            raise Refused(errno.EINVAL, "the socket is already bound")
        self._limit_checks.require_free(channel.sock.fileno())
        endpoint = self._claim(channel, channel.kind, request, request.cookie)
        endpoint.handle = channel
        endpoint.sizes = request.sizes()
        channel.endpoint = endpoint
        self._note(channel)
        self._reply(channel, request, encode_endpoint(endpoint))
        return True

    def _bind_socket(self, channel: Channel, request: Request) -> bool:
        with take_socket(channel, SOCK_STREAM, SOCK_SEQPACKET) as sock:
            if not request.cookie or self._holders.get(request.cookie, channel) is not channel:
                raise ProtocolError("invalid secret of a named socket")
            require_unreserved(sock.fileno())
            moved = channel.moved
            # A refused CONNECT has taken the endpoint.
            if moved is not None and channel.endpoint is None:
                channel.endpoint, moved.endpoint = moved.endpoint, None
                self._note(moved)
            endpoint, listener = channel.endpoint, channel.listener
            if endpoint is None:
                kind = _STREAM if sock.type == SOCK_STREAM else _SEQPACKET
                endpoint = self._claim(channel, kind, request)
                endpoint.sizes = request.sizes()
            try:
                name = f"{self.datagrams.epoch}.stream.{next(self._names)}"
                named = NamedSocket(*bind_to_name(sock, name))
            except BaseException:
                if channel.endpoint is None:
                    self.fabric.unbind(endpoint)
                raise
            channel.endpoint = endpoint
            before: NamedSocket | None = None
            if listener is None:
                listener = channel.listener = NamedListener(channel, named, sock.type)
                channel.secret = request.cookie
                self._holders[channel.secret] = channel
                self._sweep_later()
            else:
                assert isinstance(listener, NamedListener)
                before = listener.replace(named, sock.type)
            endpoint.handle = listener
            self.fabric.replace_socket(endpoint, cookie_of(sock), os.fstat(sock.fileno()).st_ino)
            self._note(channel)
            self._reply(channel, request, encode_endpoint(endpoint))
            if before is not None:
                before.close()
        return True

    def _listen(self, channel: Channel, request: Request) -> bool:
        if channel.endpoint is None:
            raise Refused(errno.EINVAL, "the socket is not bound")
        # A listening socket receives announcements, and would take the reply for an announcement.
        silent = channel.endpoint.listening and isinstance(channel.listener, AnnouncedListener)
        if channel.listener is None:
            channel.listener = channel.endpoint.handle = AnnouncedListener(channel)
        channel.listener.prepare(request.backlog)
        self.fabric.listen(channel.endpoint, request.sizes())
        record = encode_endpoint(channel.endpoint)
        if silent:
            self.record_channel(channel)
            consume(channel, request.polling)
        else:
            self._note(channel)
            self._reply(channel, request, record)
        return True

    def _update(self, channel: Channel, request: Request) -> bool:
        if channel.endpoint is None:
            raise ProtocolError("UPDATE of a socket that is not bound")
        channel.endpoint.sizes = request.sizes()
        self.record_channel(channel)
        consume(channel, request.polling)
        return True

    def _note(self, channel: Channel) -> None:
        """Record a channel in the journal's next entry."""
        if self.journal is not None:
            self.journal.channel(channel)

    def record_channel(self, channel: Channel) -> None:
        """Record a channel in the journal at once."""
        if self.journal is not None:
            self.journal.channel(channel)
            self.journal.commit()

    def _connect(self, channel: Channel, request: Request) -> bool:  # noqa: C901 - hot path
        # Spelled out: each look-up of a field by its name costs as much as all of this.
        _, _, _, _, peer_cid, peer_port, _, size, minimum, maximum, cookie, inode = request
        if inode:
            self._move_endpoint(channel, inode)
        bound = channel.endpoint
        if bound is not None and bound.listening:
            raise ProtocolError("CONNECT of a listening socket")
        fabric, context, sock = self.fabric, channel.context, channel.sock
        if channel.is_device:
            bound = channel.endpoint = self._claim(channel, channel.kind, request)
        asker = channel.deputy or channel  # Channel.asker
        listener = fabric.find_listener(context, channel.kind, peer_cid, peer_port, asker, bound)
        target: Listener | HandoffLink = listener.handle
        if channel.party.is_at_limit():
            self._limit_checks.check_pending_limit(channel.party, target.recount_pending)
            self._limit_checks.reclaim_sockets(channel.party)
        if channel.last_device not in (None, target):
            # That device may still hold a duplicate, and could read and write this stream.
            raise Refused(
                errno.ECONNRESET, "this socket was refused by another device: open a new one"
            )
        if not target.has_room():
            self._drop_if_closed(target)
            raise Refused(errno.ECONNRESET, f"the backlog of {listener.address} is full")
        if isinstance(target, HandoffLink):
            target.require_settled(peer_port, context, bound)
        if self._unannounced.targets:
            self._unannounced.require_announceable(channel, target)
        sizes = _new(BufferSizes, (size, minimum, maximum))
        connection = fabric.connect(context, listener, bound, sizes, asker.credentials, cookie)
        try:
            if isinstance(target, HandoffLink):
                self.streams.add_pending(channel, connection)
            else:
                connection.watch = self.streams.add(sock.fileno(), connection.number)
        except OSError as error:  # out of memory, or of epoll registrations (epoll(7))
            self._abandon(channel, connection)
            raise Refused(errno.ENOBUFS, f"cannot watch the stream: {error.strerror}") from None
        if isinstance(target, HandoffLink):
            self._offer(channel, request, connection, target)
        else:
            if bound is not None:
                channel.endpoint = None
            if self.journal is not None:
                self.journal.connected(channel, connection, bound, target, request.flags)
            self.complete(channel, request.flags, connection, target)
        if channel.is_device:
            self.queries.report_listener_size(connection)
        self.streams.reap_sometimes()
        return False

    def _move_endpoint(self, channel: Channel, secret: int) -> None:
        """Move the endpoint of a named socket to ``channel``, a connection of the same socket."""
        holder = self._holders.get(secret)
        if holder is not None and holder.moved is channel and channel.endpoint is not None:
            return  # an earlier CONNECT, which was refused, has moved the endpoint
        if holder is None or holder.context is not channel.context or holder.endpoint is None:
            raise Refused(errno.EINVAL, "the socket is not bound")
        if holder.endpoint.listening or channel.endpoint is not None:
            raise ProtocolError("CONNECT of a socket that is listening or bound elsewhere")
        channel.endpoint, holder.endpoint = holder.endpoint, None
        holder.moved = channel
        self._note(holder)

    def complete(
        self, channel: Channel, flags: int, connection: Connection, target: Listener
    ) -> None:
        """Complete a client's connect, and announce the connection to the listening program.

        ``flags`` are those of the request.  Steps that a vsockd that was killed has done are not
        repeated.
        """
        sock, in_flight = channel.sock, self.in_flight
        if connection.size != STREAM_BUFFER_DEFAULT_BYTES:
            sock.setsockopt(SOL_SOCKET, SO_SNDBUF, min(connection.size, SEND_BUFFER_MAX_BYTES))
        if channel.kind is _SEQPACKET and not target.marks_records:
            refuse_descriptors(sock)  # a stream refuses descriptors from its creation on
        # The reply goes first: once the listening program has the descriptor, it may write.
        channel.send(encode_connecting(connection), in_flight)
        if flags or channel.kind is _SEQPACKET:
            consume(channel, flags & _POLLING != 0)
        channel.receive_credentials(False)
        if in_flight is not None and in_flight.is_done(_ANNOUNCE):
            return
        record = encode_accepting(connection)
        try:
            target.announce(record, sock.fileno(), channel.party, in_flight)
        except OSError as error:
            waits = error.errno in SHORTAGE
            what = "is waiting to be announced" if waits else "is lost"
            reason = f"connection to {connection.peer} {what}: {error.strerror}"
            self._log(logging.WARNING, channel, reason)
            if waits:
                target.hold(record, sock.fileno(), channel.party)
                self.record_channel(target.channel)
                self._unannounced.add(target, error)
            else:
                self.fabric.end(connection.number)
                self._drop_listener(target)

    def _drop_listener(self, target: Listener) -> None:
        """Drop a listener whose program cannot receive announcements.

        The program has shut down reading, or closed the socket.
        """
        if target.channel.sock.fileno() < 0:
            return  # this request has probed named sockets, and dropped the listener already
        target.channel.send(Record(errno.EBADF).encode())  # the client must not reconnect
        self.drop(target.channel)

    def _offer(
        self, channel: Channel, request: Request, connection: Connection, target: HandoffLink
    ) -> None:
        """Hand a connection off to a device, which accepts or refuses it."""
        record = encode_offer(connection, channel.connect_flags, request.polling)
        target.expect(record, channel)
        if self.journal is not None:
            self.journal.pending(channel, connection, target, record)
        try:
            target.hand_over(record, channel.sock, self.in_flight)
        except OSError as error:
            target.forget(record)
            if self.journal is not None:
                self.journal.withdraw(channel, target)
            self._abandon(channel, connection)
            code = errno.ENOBUFS if error.errno in SHORTAGE else errno.ECONNRESET
            raise Refused(code, f"the device cannot be asked: {error.strerror}") from None

    def _abandon(self, channel: Channel, connection: Connection) -> None:
        """End a connection whose client gets a refusal; a bound socket gets its port back."""
        self.fabric.end(connection.number)
        if channel.endpoint is not None:
            self.fabric.rebind(channel.endpoint)

    def _bind_datagram(self, channel: Channel, request: Request) -> bool:
        with take_socket(channel, SOCK_DGRAM) as sock:
            self._limit_checks.require_free(sock.fileno())
            if self.datagrams.find_socket(channel.context, sock) is not None:
                raise Refused(errno.EINVAL, "the datagram socket is already bound")
            endpoint = self._adopt(channel, request, sock)
            self._reply(channel, request, encode_endpoint(endpoint))
        return False

    def _route(self, channel: Channel, request: Request) -> bool:
        with take_socket(channel, SOCK_DGRAM) as sock:
            self._limit_checks.require_free(sock.fileno())
            source = channel.sender = self.datagrams.find_socket(channel.context, sock)
            asker = channel.asker
            wanted = (channel.context, request.peer_cid, request.peer_port, asker)
            destination = self.fabric.find_datagram(*wanted, source)
            if source is None:
                source = self._adopt(channel, request, sock)
                # Once more: binding may have found the destination closed, or the source may now
                # be bound to an address that cannot reach it.
                destination = self.fabric.find_datagram(*wanted, source)
        route = self.datagrams.route(source, destination)
        record = Record(
            0, 0, *source.address, *destination.address, Role.DATAGRAM, *destination.owner
        )
        fd = route.sock.fileno()
        if self.journal is not None:
            self.journal.commit(("route", channel.sock.fileno(), record.encode(), fd))
        try:
            channel.send_descriptor(record.encode(), fd)
        except Refused:
            route.revoke()
            raise
        consume(channel, False)
        return False

    def _catch_all(self, channel: Channel, request: Request) -> bool:
        if not channel.is_device:
            raise ProtocolError("CATCH_ALL from a client that is not a device")
        device = channel.context.device
        assert device is not None
        with take_socket(channel, SOCK_DGRAM) as sock:
            device.streams.set_datagrams(self.datagrams.catch_all(channel.context, sock))
            self._reply(channel, request, Record(0).encode())
        return False

    def _capture(self, channel: Channel, request: Request) -> bool:
        with closing(capture(self.fabric, channel, request)) as records:
            channel.send_descriptor(Record(0).encode(), records.fileno())
            consume(channel, request.polling)
        return False

    def _query(self, channel: Channel, request: Request) -> bool:
        self._reply(channel, request, self.queries.look_up(channel, request))
        return False

    def _resize(self, channel: Channel, request: Request) -> bool:
        self.queries.resize(channel, request)
        self._reply(channel, request, Record(0).encode())
        return False

    def _count(self, channel: Channel, request: Request) -> bool:
        stream = self.queries.count(channel, request, monotonic())
        if stream is not None and self.journal is not None:
            self.journal.moved(stream)
            self.journal.commit()
        consume(channel, request.polling)
        return True

    def _local_cid(self, channel: Channel, request: Request) -> bool:
        self._reply(channel, request, self.queries.local_cid(channel, request))
        return False

    # Helpers of the operations

    def _claim(
        self, channel: Channel, kind: EndpointKind, request: Request, cookie: int = 0
    ) -> Endpoint:
        self._limit_checks.reclaim_sockets(channel.party)
        privileged = not request.flags & _UNPRIVILEGED
        address = request.local_cid, request.local_port
        asker = channel.asker
        arguments = (channel.context, kind, *address, asker, cookie, privileged)
        try:
            return self.fabric.bind(*arguments)
        except Refused as refused:
            if refused.errno != errno.EADDRINUSE:
                raise
        # The port seems to be held: probe whether its holder's socket is still open.
        context = channel.context
        ports = context.datagrams if kind is EndpointKind.DATAGRAM else context.connected
        holder = ports.get(request.local_port)
        if isinstance(holder, Connection):
            if self._limit_checks.may_probe(channel.party):
                self.streams.reap_one(holder)
        elif holder is not None and holder.kind is EndpointKind.DATAGRAM:
            self.datagrams.is_open(holder)
        elif isinstance(holder, Endpoint):
            self._drop_if_closed(holder.handle)
        return self.fabric.bind(*arguments)

    def _adopt(self, channel: Channel, request: Request, sock: _socket.socket) -> Endpoint:
        endpoint = self._claim(channel, EndpointKind.DATAGRAM, request)
        try:
            self.datagrams.adopt(endpoint, sock)
        except BaseException:
            self.fabric.unbind(endpoint)
            raise
        return endpoint
