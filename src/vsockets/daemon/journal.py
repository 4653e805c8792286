"""The journal: vsockd's state, in memory that outlives vsockd.

It begins with the whole state, in the form of :mod:`.handover`; a successor saves parts of that
while its predecessor serves.  Each entry after that has what one request, or one other event, has
changed: rows ``(table, number, row)``, with None for a row that was removed.  A connect, the most
frequent request, has an entry of its own form.  An entry is written before the reply to the request
is sent, with what is left to do for the request (:mod:`.in_flight`).  When the entries take more
space than the beginning, a new journal replaces it.

The journal is a memory file among the descriptors that vsockd shares with its holder: it lasts as
long as the descriptors that it names, needs no space on a disk, and is open to no other user.  An
entry counts when the file's length field includes it, so one that was not complete when vsockd was
killed does not.  Each has a checksum: a journal that is damaged is not used.
"""

from __future__ import annotations

import _socket
import marshal
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any, Protocol
from weakref import WeakSet
from zlib import crc32

from ..eventloop.loop import EventLoop
from ..fabric import Connection, Context, Endpoint, Fabric
from .handover import (
    Saved,
    Writer,
    save_connections,
    save_context,
    save_counts,
    save_endpoint,
)
from .in_flight import InFlight
from .limits import DAEMON_JOURNAL_LEAST_BYTES

#: The journal's length in bytes, and its complement, at its start.
_LENGTH = struct.Struct("Q")
#: Before each entry.
_HEADER = struct.Struct("II")  # length and checksum of the content
_START = _LENGTH.size
# Aliases: hot path.
_HEADER_SIZE, _pack_header, _pack_length = _HEADER.size, _HEADER.pack, _LENGTH.pack_into
#: The entry of a connect: the row of :func:`.save_connections`, and what is left to do.  Its first
#: byte is zero, which marshal never writes.
_CONNECT = struct.Struct("=x??8I5Q5q2iIiQ")
_pack_connect = _CONNECT.pack

#: A changed row: table, number, and the row, or None if it was removed.
Change = tuple[str, int, Any]
#: What is left to do for a request: a word, the descriptor of its channel, and more.
Left = tuple[Any, ...]


class KeptChannel(Protocol):
    """The part of a channel that the journal uses."""

    endpoint: Endpoint | None
    sock: _socket.socket

    def save(self, writer: Writer) -> Saved:
        """Return the channel's state for the next vsockd."""


class AnnouncingListener(Protocol):
    """The part of a listener that the journal uses."""

    @property
    def channel(self) -> KeptChannel:
        """The channel of the listener."""

    @property
    def next_token(self) -> int:
        """The descriptor of a socket for the next connection, or -1."""


class KeptLink(Protocol):
    """The part of a link to a device or relay that the journal uses."""

    @property
    def is_open(self) -> bool:
        """True until the link is closed."""

    def save(self, writer: Writer) -> Saved:
        """Return the link's state for the next vsockd."""


class JournalDamaged(Exception):
    """A journal that cannot be used; the text says what to do."""


_COMPLEMENT = 0xFFFF_FFFF


class Log:
    """A memory file with entries."""

    def __init__(self, size: int) -> None:
        """Create an empty log with space for ``size`` bytes, which grows when needed."""
        self.fd = os.memfd_create("vsockd-journal", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, _START + size)
        self._map = mmap.mmap(self.fd, _START + size)
        self.end = _START
        self.include()

    def append(self, content: bytes) -> None:
        """Write an entry, which counts once :meth:`include` is called."""
        end = self.end + _HEADER.size + len(content)
        if end > len(self._map):
            self._map.resize(2 * end)
        self._map[self.end : end] = _HEADER.pack(len(content), crc32(content)) + content
        self.end = end

    def include(self) -> int:
        """Let the entries that were written count; return the log's length."""
        # One store: it happens, or it does not.
        end = self.end
        _LENGTH.pack_into(self._map, 0, end | (end ^ _COMPLEMENT) << 32)
        return end

    def add(self, content: bytes) -> int:
        """Append an entry and include it, in one call (hot path); return the log's length."""
        mapped, begin, size = self._map, self.end, len(content)
        end = self.end = begin + _HEADER_SIZE + size
        if end > len(mapped):
            mapped.resize(2 * end)
        mapped[begin:end] = _pack_header(size, crc32(content)) + content
        _pack_length(mapped, 0, end | (end ^ _COMPLEMENT) << 32)
        return end

    def close(self) -> None:
        """Close the file."""
        self._map.close()
        os.close(self.fd)


def read_entries(fd: int) -> Iterator[tuple[Any, Left | None, int]]:
    """Return the entries of the journal ``fd``, each with changes, remaining work and number.

    Raises JournalDamaged.
    """
    size = os.fstat(fd).st_size
    if size < _START:
        raise _damaged(f"its size is {size}")
    with mmap.mmap(fd, size) as content:
        (length,) = _LENGTH.unpack_from(content)
        length, complement = length & _COMPLEMENT, length >> 32
        at = _START
        if not _START < length <= size or length ^ complement != _COMPLEMENT:
            raise _damaged(f"its length field has {length}, its size is {size}")
        while at < length:
            begin = at + _HEADER.size
            if begin > length:
                raise _damaged(f"the entry at {at} exceeds it")
            number, wanted = _HEADER.unpack_from(content, at)
            at = begin + number
            data = content[begin:at]
            if at > length or crc32(data) != wanted:
                raise _damaged(f"the entry at {begin} has a wrong length or checksum")
            try:
                yield marshal.loads(data) if data[0] else _decode_connect(data)
            except (EOFError, ValueError, TypeError, IndexError, struct.error) as error:
                raise _damaged(f"the entry at {begin} is invalid: {error}") from None


def _decode_connect(data: bytes) -> tuple[list[Change], Left, int]:
    """Return the entry of a connect as that of another request."""
    has_cookie, has_port, number, cid, *rest = _CONNECT.unpack(data)
    local_cid, local_port, peer_cid, peer_port, listener, channel, *rest = rest
    size, wanted, minimum, maximum, cookie, *rest = rest
    pid, uid, gid, party_cid, party_uid, group, fd, flags, token, serial = rest
    row = (
        *(number, cid, listener, (local_cid, local_port), (peer_cid, peer_port), size),
        *((wanted, minimum, maximum), (pid, uid, gid), (party_cid, party_uid)),
        *(cookie, has_cookie, has_port, group),
    )
    left = "connect", fd, number, channel, flags, token
    return [("connections", number, row)], left, serial


def _damaged(problem: str) -> JournalDamaged:
    advice = "vsockd has ended, and its sockets with it: start it again (vsock up)"
    return JournalDamaged(f"the journal is damaged: {problem}; {advice}")


class Journal:
    """The journal of this vsockd, and the rows that its next entry will have."""

    def __init__(
        self,
        in_flight: InFlight,
        loop: EventLoop,
        fabric: Fabric,
        save: Callable[[Writer], Saved],
        save_handle: Callable[[Writer, object], Any],
    ) -> None:
        """Start without a file; ``save`` returns vsockd's whole state."""
        self.in_flight = in_flight
        self._loop = loop
        self._fabric = fabric
        self._fabric.ended = []
        self._save = save
        self._save_handle = save_handle
        self._log: Log | None = None
        self._limit = 0
        self._serial = 0  # of the last entry with something left to do
        self._replaces = False  # True: a new journal is to be begun
        self._channels: dict[KeptChannel, None] = {}
        #: channels that a link refers to, and that are dropped without the link's forgetting them
        self._handed_off: WeakSet[KeptChannel] = WeakSet()
        self._endpoints: dict[Endpoint, None] = {}
        self._links: dict[KeptLink, None] = {}
        self._refused: dict[int, Context] = {}
        self._changes: list[Change] = []
        self._ended: list[int] = []
        self._parts: list[bytes] = []  # of the beginning
        self._was_kept = False  # the channel of the connection that was handed off last
        self.writer = Writer(fabric, lasting=True)

    def prepare(self, save_early: Callable[[Writer], Iterator[Saved]]) -> None:
        """Save parts of the beginning (:func:`.succession.save_early`) before :meth:`begin`."""
        self._parts = [marshal.dumps(part) for part in save_early(self.writer)]

    def begin(self, left: Left | None = None, serial: int = 0) -> None:
        """Begin a new journal with vsockd's present state, instead of the old one.

        ``left`` is the work that the previous vsockd has left to do, ``serial`` the number of its
        entry.
        """
        self._serial = max(self._serial, serial)
        if not self._parts:
            self.writer = Writer(self._fabric, lasting=True)
        state = self._save(self.writer) | {"parts": self._parts}
        content = marshal.dumps((state, left, serial))
        self._parts = []
        before = self._log
        self._limit = 2 * len(content) + DAEMON_JOURNAL_LEAST_BYTES
        log = self._log = Log(self._limit + _HEADER.size)
        log.append(content)
        log.include()
        self.in_flight.memory.journal = log.fd  # one store
        if before is not None:
            before.close()
        self._channels.clear()
        self._endpoints.clear()
        self._links.clear()
        self._refused.clear()
        self._changes.clear()
        self._ended.clear()
        self._fabric.ended = self._ended
        self._replaces = False

    def _begin_if_needed(self) -> None:
        if self._replaces:
            self.begin()

    # Changes

    def channel(self, channel: KeptChannel) -> None:
        """Record ``channel``, and its endpoint, in the next entry."""
        self._channels[channel] = None
        self._handed_off.discard(channel)
        if channel.endpoint is not None:
            self._endpoints[channel.endpoint] = None

    def endpoint(self, endpoint: Endpoint) -> None:
        """Record ``endpoint`` in the next entry."""
        self._endpoints[endpoint] = None

    def forget(self, channel: KeptChannel) -> None:
        """Record that ``channel`` is not kept any longer."""
        self._channels.pop(channel, None)
        number = self.writer.channels.pop(channel, None)
        if number is not None:
            self._changes.append(("channels", number, None))

    def link(self, link: KeptLink) -> None:
        """Record a link to a device or relay in the next entry."""
        self._links[link] = None

    def forget_link(self, link: KeptLink) -> None:
        """Record that ``link`` is closed."""
        self._links.pop(link, None)
        number = self.writer.links.pop(link, None)
        if number is not None:
            self._changes.append(("links", number, None))

    def row(self, table: str, number: int, row: object) -> None:
        """Record a row in the next entry; None for one that was removed."""
        self._changes.append((table, number, row))

    def context(self, context: Context, is_present: bool, listeners: Saved | None) -> None:
        """Record a context, and its control sockets, in the next entry."""
        self.row("contexts", context.cid, save_context(context) if is_present else None)
        self.row("listeners", context.cid, listeners)
        self.row("values", 0, self._fabric.contexts.following)

    def moved(self, stream: Connection) -> None:
        """Record the bytes that were reported of a stream in the next entry."""
        if stream.meter is not None:
            self.row("moved", stream.number, (*stream.meter.total,))

    def moved_by(self, context: Context) -> None:
        """Record the bytes that a context's device has reported in the next entry."""
        if context.meter is not None:
            self.row("context_moved", context.cid, (*context.meter.total,))

    def refused(self, context: Context) -> None:
        """Record in the next entry the counts of a context whose request is refused."""
        self._refused[context.cid] = context

    def commit(self, left: Left | None = None) -> None:
        """Write an entry with the changes since the last one, and what is ``left`` to do then.

        Nothing is written without changes.
        """
        log = self._log
        if log is not None and self._collect():
            serial = 0
            if left is not None:
                serial = self._serial = self._serial + 1
                self.in_flight.commit(serial)
            self._append(log, left, serial)
            if log.include() > self._limit:
                self._begin_later()

    def _collect(self) -> bool:
        """Add the rows of all noted objects to the entry; return whether it has changes."""
        if self._channels or self._endpoints or self._links:
            self._save_changed()
        if self._ended:
            self._changes.append(("ended", 0, self._ended))
        if self._refused:
            for cid, context in self._refused.items():
                counts = save_counts(context.counts)
                self.row("refusals", cid, (counts["refusals"], counts["denials"]))
            self._refused.clear()
        return bool(self._changes)

    def _append(self, log: Log, left: Left | None, serial: int) -> None:
        log.append(marshal.dumps((self._changes, left, serial)))
        self._changes.clear()
        self._ended.clear()

    def _begin_later(self) -> None:
        """Begin a new journal, but not in the middle of a request."""
        if not self._replaces:
            self._replaces = True
            self._loop.call_later(0, self._begin_if_needed)

    def connected(
        self,
        channel: KeptChannel,
        connection: Connection,
        bound: Endpoint | None,
        target: AnnouncingListener,
        flags: int,
    ) -> None:
        """Write an entry for a connect that is to be completed: see :meth:`.Broker.complete`.

        ``bound`` is the endpoint that the connecting socket had, if any.
        """
        # Spelled out, hot path: a call, and a starred argument, cost as much as three fields.
        writer, log = self.writer, self._log
        assert log is not None
        if channel in writer.channels:
            self.forget(channel)
        if bound is not None:
            self._endpoints[bound] = None
        if self._channels or self._endpoints or self._ended or self._changes or self._links:
            self._collect()
            self._append(log, None, 0)
        party = writer.party(connection.party)
        assert party is not None
        number, context, cookie = connection.number, connection.context, connection.cookie
        local_cid, local_port = connection.local
        peer_cid, peer_port = connection.peer
        size, minimum, maximum = connection.sizes
        pid, uid, gid = connection.owner
        serial = self._serial = self._serial + 1
        entry = _pack_connect(
            context.cookies.get(cookie) is connection,
            context.connected.get(local_port) is connection,
            number,
            context.cid,
            local_cid,
            local_port,
            peer_cid,
            peer_port,
            writer.number_of(connection.listener),
            writer.channels[target.channel],
            connection.size,
            size,
            minimum,
            maximum,
            cookie,
            pid,
            uid,
            gid,
            party[0],
            party[1],
            writer.group(connection.watch),
            channel.sock.fileno(),
            flags,
            target.next_token,
            serial,
        )
        self.in_flight.commit(serial)
        if log.add(entry) > self._limit:
            self._begin_later()

    def completed(self, connection: Connection) -> None:
        """Record in the next entry that a device or relay has accepted a connection."""
        self._endpoints[connection.listener] = None
        row = save_connections(self.writer, (connection,))[0]
        self._changes.append(("connections", connection.number, row))

    def dropped(self, channel: KeptChannel) -> None:
        """Write an entry for a channel that is to be closed; then call :meth:`closed`."""
        self.in_flight.memory.doomed = channel.sock.fileno()
        if channel not in self._handed_off:
            self.forget(channel)
        if channel.endpoint is not None:
            self.endpoint(channel.endpoint)
        self.commit()

    def closed(self) -> None:
        """Record that the dropped channel's descriptor, which may be reused now, is closed."""
        self.in_flight.memory.doomed = -1

    def end_request(self) -> None:
        """Write what the request being served has changed, and finish it."""
        self.commit()
        self.in_flight.end()

    def pending(
        self, channel: KeptChannel, connection: Connection, target: KeptLink, record: bytes
    ) -> None:
        """Write an entry for a connection that is handed off to a device or relay."""
        self._was_kept = channel in self.writer.channels
        self.forget(channel)
        self._endpoints[connection.listener] = None
        self._links[target] = None
        row = save_connections(self.writer, (connection,))[0]
        self._changes.append(("pending", connection.number, row))
        self._handed_off.add(channel)
        number = self.writer.channel(channel)
        assert number is not None
        # vsockd does not have the socket then.
        row = {**channel.save(self.writer), "socket": None, "kept": False}
        self._changes.append(("channels", number, row))
        fd = channel.sock.fileno()
        self.commit(("offer", fd, self.writer.link(target), record))

    def withdraw(self, channel: KeptChannel, target: KeptLink) -> None:
        """Record in the next entry that the connection of :meth:`pending` is not handed off."""
        self._links[target] = None
        if self._was_kept:  # else the channel is recorded when it is kept
            self.channel(channel)

    def _save_changed(self) -> None:
        writer = self.writer
        known, known_channels = len(writer.endpoints), len(writer.channels)
        for link in self._links:
            if link.is_open:
                number = writer.link(link)
                assert number is not None
                self._changes.append(("links", number, link.save(writer)))
        for channel in [*self._channels, *list(writer.channels)[known_channels:]]:
            if channel in self._channels or channel.sock.fileno() < 0:
                number = writer.channel(channel)
                kept = channel in self._channels
                assert number is not None
                self._changes.append(("channels", number, {**channel.save(writer), "kept": kept}))
        for endpoint in [*self._endpoints, *list(writer.endpoints)[known:]]:
            number = writer.endpoint(endpoint)
            assert number is not None
            handle = self._save_handle(writer, endpoint.handle)
            self._changes.append(
                ("endpoints", number, save_endpoint(writer, endpoint) | {"handle": handle})
            )
        self._channels.clear()
        self._endpoints.clear()
        self._links.clear()
