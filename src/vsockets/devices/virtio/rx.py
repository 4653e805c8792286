"""The guest's receive queue: packets to the guest, into the buffers it has offered.

A stream's bytes go from the host's socket straight into as many of the guest's buffers as it
has credit for, by one system call; then each buffer gets its header.
"""

from __future__ import annotations

import select
import socket
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from socket import MSG_CTRUNC, MSG_DONTWAIT, MSG_PEEK, MSG_TRUNC

from ..capture import CaptureSink
from ..limits import IO_VECTORS_MAX
from ..vectored_io import pull
from .capture import record
from .connection import BOTH
from .credit import MANY
from .host_stream import HostStream
from .limits import VIRTIO_MERGED_PACKET_MAX_BYTES
from .packet import HEADER, HEADER_SIZE, Op, Sequenced, Shutdown, Type
from .ring import Chain, Ring, RingError, total

_pack_header = HEADER.pack_into
_RW, _STREAM = int(Op.RW), int(Type.STREAM)
_SEND_ENDED = int(Shutdown.SEND)
_END_OF_MESSAGE, _END_OF_RECORD = int(Sequenced.END_OF_MESSAGE), int(Sequenced.END_OF_RECORD)
_LOOK = int(MSG_PEEK | MSG_TRUNC | MSG_DONTWAIT)
_TAKE = int(MSG_DONTWAIT)

#: Buffers of the guest that one connection fills in one turn.
_SMALLEST_BURST, _LARGEST_BURST = 2, 16


#: One chain of the guest's, understood: the ring's note of it, the header (None when it is in
#: several parts, and then at the front of them), the other parts, and the bytes they take.
_Buffer = tuple[int, memoryview | None, list[memoryview], int]


def _understand(chain: Chain) -> _Buffer:
    note, readable, parts = chain
    if readable or not parts:
        raise RingError("a buffer of the receive queue that is not to be written")
    first = parts[0]
    size = len(first)
    if size == HEADER_SIZE:
        del parts[0]
    elif size > HEADER_SIZE:
        parts[0] = first[HEADER_SIZE:]
    else:
        room = total(parts) - HEADER_SIZE
        if room < 0:
            raise RingError("a buffer of the receive queue that takes no header")
        return note, None, parts, room
    return note, first, parts, len(parts[0]) if len(parts) == 1 else total(parts)


class ReceiveQueue:
    """Sends packets to the guest ``cid``."""

    def __init__(self, ring: Ring, cid: int, tap: CaptureSink) -> None:
        self._ring = ring
        self._cid = cid
        self._tap = tap
        self._stock: deque[_Buffer] = deque()  # popped and not used yet

    def stop(self) -> int:
        """Let go of the guest's memory; returns where to go on."""
        self._ring.rewind()
        self._stock.clear()
        self._ring.publish()
        return self._ring.base

    def publish(self) -> bool:
        """Let the guest see its packets; returns whether it wants to be told."""
        return self._ring.publish()

    def prepare(self) -> None:
        """Understand the buffers of the next packets while nobody waits for them."""
        self._restock(_SMALLEST_BURST)

    def has_buffers(self) -> bool:
        """Whether there is a buffer; if not, a kick will come with the next one."""
        return bool(self._restock(1) or (self._ring.want_kick() and self._restock(1)))

    def send_raw(self, header: bytes) -> None:
        """Send a packet without payload.  There is a buffer."""
        note, place, parts, _ = self._stock.popleft()
        if place is not None:
            place[:HEADER_SIZE] = header
        else:
            _scatter(header, parts)
        self._ring.push(note, HEADER_SIZE)
        if self._tap.sinks:
            record(self._tap, header)

    def send(self, link: HostStream) -> bool:
        """Send what there is from ``link``, for a turn; returns whether payload was among it."""
        while link.say:
            if not self._restock(1):
                return False
            packet = link.next_packet()
            assert packet is not None
            op, flags = packet
            self.send_raw(self._header(link, 0, op, flags))
        if not link.may_send:
            if link.readable and link.gone:
                link.readable = False
                link.host_ends(BOTH)
            return False
        if link.type == _STREAM:
            return link.readable and self._stream(link)
        return self._messages(link)

    def _header(self, link: HostStream, length: int, op: int, flags: int) -> bytes:
        receive = link.receive
        return HEADER.pack(
            link.peer[0], self._cid, link.peer[1], link.guest_port,
            length, link.type, op, flags, receive.size, receive.tell(),
        )  # fmt: skip

    def _restock(self, wanted: int) -> int:
        """Have ``wanted`` buffers if the guest has offered so many; returns how many."""
        stock, pop = self._stock, self._ring.pop
        while len(stock) < wanted:
            chain = pop()
            if chain is None:
                break
            stock.append(_understand(chain))
        return len(stock)

    # Payload

    def _stream(self, link: HostStream) -> bool:
        credit = link.send.available()
        sock = link.sock
        if sock is None or not credit or not self._restock(link.burst):
            return False
        buffers: Iterable[_Buffer] = islice(self._stock, link.burst)
        small = False
        if link.send.packets * MANY >= link.send.buffer:
            most = self._packet_size(link)
            if not most:
                return False
            small = most == VIRTIO_MERGED_PACKET_MAX_BYTES
            if small:
                buffers = _cut(buffers, most)
        views: list[memoryview] = []
        room = 0
        for _, header, parts, size in buffers:
            if len(views) + len(parts) > IO_VECTORS_MAX:
                break
            views += parts if header is not None else _after_header(parts)
            room += size
            if room >= credit:
                break
        if room > credit:
            _shorten(views, room - credit)
            room = credit
        if not room:  # buffers for headers alone
            self._give_back()
            return False
        received = pull(sock, views)
        if received is None:
            link.readable = False
            return False
        if received == 0:
            link.readable = False
            link.host_ends(BOTH if link.gone else _SEND_ENDED)
            return False
        used = self._label_small(link, received) if small else self._label(link, received)
        if received == room:
            link.burst = min(link.burst * 2, _LARGEST_BURST)
            return True
        link.burst = max(_SMALLEST_BURST, used)
        # Less than there was room for: it is empty.  Only an end would not be announced again.
        link.readable = link.hung_up
        return True

    def _packet_size(self, link: HostStream) -> int:
        """As :meth:`.credit.SendCredit.packet_size`; asks the guest what it has read."""
        send = link.send
        most = send.packet_size(self._stock[0][3] or 1)
        if send.is_to_be_asked() or send.is_full:
            link.ask_for_credit()
        return most

    def _label(self, link: HostStream, received: int) -> int:
        """Write the headers of payload that is in the first buffers; returns how many."""
        stock, push = self._stock, self._ring.push
        cid, port = link.peer
        size, told = link.receive.size, link.receive.tell()
        total, used, room = received, 0, 0
        while received > 0:
            note, header, parts, room = stock.popleft()
            length = room if room < received else received
            received -= length
            used += 1
            if header is None:
                _scatter(self._header(link, length, _RW, 0), parts)
            else:
                _pack_header(
                    header, 0, cid, self._cid, port, link.guest_port,
                    length, _STREAM, _RW, 0, size, told,
                )  # fmt: skip
            push(note, HEADER_SIZE + length)
            if self._tap.sinks:
                payload = parts if header is not None else _after_header(parts)
                record(self._tap, self._header(link, length, _RW, 0), payload)
        link.send.spend(total, used, room - length)
        return used

    def _label_small(self, link: HostStream, received: int) -> int:
        """As :meth:`_label`, with packets of at most VIRTIO_MERGED_PACKET_MAX_BYTES bytes."""
        used = 0
        while received:
            room = self._stock[0][3]
            if not room:
                self._give_back()
                continue
            length = min(room, VIRTIO_MERGED_PACKET_MAX_BYTES, received)
            used += self._label(link, length)
            received -= length
        return used

    def _messages(self, link: HostStream) -> bool:
        sent = False
        for _ in range(_LARGEST_BURST):
            if not self._restock(1) or (not link.incoming and not self._take_message(link)):
                break
            self._fragment(link)
            sent = True
            while link.incoming and self._restock(1):
                self._fragment(link)
            if link.incoming:
                break
        return sent

    def _take_message(self, link: HostStream) -> bool:
        """Read the next message for which there is credit into ``link.incoming``."""
        sock = link.sock
        if sock is None or not link.readable:
            return False
        try:
            size = sock.recv_into(bytearray(1), 0, _LOOK)
            if size > link.send.buffer:
                link.reset()  # the guest could never take it
                return False
            if size > link.send.available():
                link.needed = size
                return False
            link.needed = 1
            room = self._stock[0][3] or 1
            if not link.send.takes_message(-(-size // room) or 1):
                link.ask_for_credit()
                return False
            data, _, shown, _ = sock.recvmsg(max(size, 1), 0, _TAKE)
            link.ends_record = bool(shown & MSG_CTRUNC)  # it came with a marker
        except BlockingIOError:
            link.readable = False
            return False
        except ConnectionError:
            data = b""
        if not data and _has_ended(sock):  # not just a message without content
            link.readable = False
            link.host_ends(BOTH if link.gone else _SEND_ENDED)
            return False
        if not data and not link.send.takes_empty_message():
            return False  # Linux's own sockets send none at all
        link.incoming = memoryview(data)
        return True

    def _fragment(self, link: HostStream) -> None:
        """Put as much of a message as fits into the first buffer."""
        note, place, parts, room = self._stock[0]
        if not room and link.incoming:
            self._give_back()
            return
        part = link.incoming[:room]
        link.incoming = link.incoming[room:]
        flags = 0
        if not link.incoming:
            flags = _END_OF_MESSAGE | (_END_OF_RECORD if link.ends_record else 0)
        header = self._header(link, len(part), _RW, flags)
        if place is not None:
            place[:HEADER_SIZE] = header
            _scatter(part, parts)
        else:
            _scatter(header + part, parts)
        self._stock.popleft()
        link.send.spend(len(part))
        self._ring.push(note, HEADER_SIZE + len(part))
        if self._tap.sinks:
            record(self._tap, header, (part,))

    def _give_back(self) -> None:
        self._ring.push(self._stock.popleft()[0], 0)


def _has_ended(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def _shorten(views: list[memoryview], excess: int) -> None:
    """Take ``excess`` bytes off the end."""
    while excess >= len(views[-1]):
        excess -= len(views.pop())
        if not views:
            return
    if excess:
        views[-1] = views[-1][:-excess]


def _cut(buffers: Iterable[_Buffer], size: int) -> Iterator[_Buffer]:
    """Yield buffers as if they took ``size`` bytes, where they take more."""
    for note, header, parts, room in buffers:
        if room > size:
            parts = parts if header is not None else _after_header(parts)
            cut: list[memoryview] = []
            left = size
            for part in parts:
                cut.append(part[:left])
                left -= len(cut[-1])
                if not left:
                    break
            yield note, memoryview(b""), cut, size
        else:
            yield note, header, parts, room


def _after_header(parts: list[memoryview]) -> list[memoryview]:
    left = HEADER_SIZE
    rest = []
    for part in parts:
        if left >= len(part):
            left -= len(part)
        else:
            rest.append(part[left:])
            left = 0
    return rest


def _scatter(data: bytes | memoryview, parts: list[memoryview]) -> None:
    at = 0
    for part in parts:
        piece = data[at : at + len(part)]
        part[: len(piece)] = piece
        at += len(piece)
        if at >= len(data):
            return
