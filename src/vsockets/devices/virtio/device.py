"""The virtio-vsock device: its queues, its connections, and the host's sockets behind them."""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

from ..capture import CaptureSink
from ..guest_memory import GuestMemory
from ..loop import DeviceLoop
from ..vhost_user import Vring
from .connection import Action, ConnectionState
from .host_stream import KINDS, TYPES, HostStream
from .limits import (
    VIRTIO_BUFFER_BYTES,
    VIRTIO_CLOSE_TIMEOUT_SECONDS,
    VIRTIO_CONNECT_TIMEOUT_SECONDS,
    VIRTIO_CONNECTIONS_MAX,
    VIRTIO_CREDIT_RETRY_SECONDS,
    VIRTIO_LARGE_BUFFERS_MAX,
    VIRTIO_SMALL_BUFFER_BYTES,
    VIRTIO_WAITING_RESETS_MAX,
)
from .packed_ring import PackedRing
from .packet import CONFIGURATION, F_SEQPACKET, F_STREAM, TRANSPORT_RESET, Header, Op, Type
from .ring import (
    F_IN_ORDER,
    F_RING_EVENT_IDX,
    F_RING_INDIRECT_DESC,
    F_RING_PACKED,
    F_VERSION_1,
    Ring,
    RingError,
)
from .rx import ReceiveQueue
from .split_ring import SplitRing
from .tx import TransmitQueue
from .tx_poll import TxPoll

log = logging.getLogger(__name__)

RECEIVE, TRANSMIT, EVENT = range(3)

# Names of our own: looking a member up in its enum costs as much as a short function.
_OPEN, _CLOSING, _GONE_STATE = ConnectionState.OPEN, ConnectionState.CLOSING, ConnectionState.GONE
#: An eventfd that nobody reads: each time something is added to it is news.
_EACH_KICK = select.EPOLLIN | select.EPOLLET
_READING = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
_WRITING = _READING | select.EPOLLOUT
_READABLE = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_HUNG_UP = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_GONE = select.EPOLLHUP | select.EPOLLERR


class Fabric(Protocol):
    """Where the guest's connects go."""

    def connect(
        self,
        kind: int,
        port: int,
        peer: tuple[int, int],
        done: Callable[[socket.socket | None], None],
    ) -> Callable[[], None]:
        """Connect from the guest's ``port``; ``done`` gets the established socket, or None.

        Returns what gives the attempt up; ``done`` is not called then.
        """


class VirtioVsock:
    """The device of the guest ``cid``, as :class:`vsockets.devices.vhost_user.session.Device`."""

    features = F_STREAM | F_SEQPACKET | F_VERSION_1 | F_IN_ORDER
    features |= F_RING_INDIRECT_DESC | F_RING_EVENT_IDX | F_RING_PACKED
    queues = 3

    def __init__(self, loop: DeviceLoop, cid: int, fabric: Fabric) -> None:
        self.cid = cid
        self.memory = GuestMemory()
        self.links: dict[tuple[int, int, int], HostStream] = {}
        self._loop = loop
        self._fabric = fabric
        self.tap = CaptureSink(loop)
        self._in_use = 0
        self._vrings: dict[int, Vring] = {}
        self._bases: dict[int, int] = {}  # where a ring was when it was last stopped
        self._receive: ReceiveQueue | None = None
        self._transmit: TxPoll | None = None
        self._events: Ring | None = None
        self._turns: deque[HostStream] = deque()  # those with something for the guest
        self._resets: deque[bytes] = deque()  # for nobody's connection
        self._answers: dict[HostStream, Callable[[int], None]] = {}
        self._attempts: dict[HostStream, Callable[[], None]] = {}
        self._busy = False
        self._marker = os.open(os.devnull, os.O_PATH | os.O_CLOEXEC)
        self._again = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        loop.watch_for(self._again, self.work, _EACH_KICK)

    def close(self) -> None:
        """Let go of everything; the rings have been stopped."""
        self._forget_connections()
        self._loop.unwatch(self._again)
        os.close(self._again)
        os.close(self._marker)

    # vhost-user

    def configuration(self) -> bytes:
        """The guest's CID."""
        return CONFIGURATION.pack(self.cid)

    def set_features(self, features: int) -> None:
        """As :class:`.session.Device` says."""
        self._in_use = features

    def start_ring(self, index: int, vring: Vring, addresses: tuple[int, int, int]) -> None:
        """As :class:`.session.Device` says."""
        if self._bases.pop(index, vring.base) != vring.base:
            log.info("the guest has started anew")
            self._forget_connections()
        kind = PackedRing if self._in_use & F_RING_PACKED else SplitRing
        event_index = bool(self._in_use & F_RING_EVENT_IDX)
        try:
            ring: Ring = kind(self.memory, vring.size, addresses, vring.base, event_index)
        except RingError as error:
            raise OSError(errno.EINVAL, f"ring {index}: {error}") from None
        self._vrings[index] = vring
        assert vring.kick is not None
        self._loop.watch_for(vring.kick, self.work, _EACH_KICK)
        if index == RECEIVE:
            self._receive = ReceiveQueue(ring, self.cid, self.tap)
        elif index == TRANSMIT:
            queue = TransmitQueue(ring, self.cid, self, self.tap)
            self._transmit = TxPoll(self._loop, queue, vring, self.work)
        else:
            self._events = ring
        # What was offered before anybody looked is announced by no kick.
        self._work_again()

    def stop_ring(self, index: int) -> int:
        """As :class:`.session.Device` says."""
        vring = self._vrings.pop(index, None)
        if vring is None:  # it was given up
            return self._bases[index]
        assert vring.kick is not None
        self._loop.unwatch(vring.kick)
        if index == RECEIVE:
            assert self._receive is not None
            base = self._receive.stop()
            self._receive = None
        elif index == TRANSMIT:
            assert self._transmit is not None
            base = self._transmit.stop()
            self._transmit = None
        else:
            assert self._events is not None
            base = self._events.base
            self._events = None
        self._bases[index] = base
        return base

    def reset(self) -> None:
        """As :class:`.session.Device` says."""
        self._forget_connections()
        self._bases.clear()

    # The host

    def offer(
        self,
        sock: socket.socket,
        peer: tuple[int, int],
        port: int,
        answer: Callable[[int], None],
    ) -> None:
        """Connect ``sock``, whose far end is ``peer``, to the guest's ``port``.

        ``sock`` becomes the device's.  ``answer`` is called with 0 when the guest accepts, else
        with the errno for who connects; then ``sock`` is the connection, or is closed.
        """
        key = (*peer, port)
        if self._receive is None or key in self.links or len(self.links) >= VIRTIO_CONNECTIONS_MAX:
            answer(errno.EHOSTUNREACH if self._receive is None else errno.ECONNRESET)
            sock.close()
            return
        link = HostStream(
            ConnectionState.OFFERED, TYPES[int(sock.type)], peer, port, self._credit()
        )
        link.sock = sock
        self.links[key] = link
        self._answers[link] = answer
        self._loop.call_later(
            VIRTIO_CONNECT_TIMEOUT_SECONDS, partial(self._give_up, link, ConnectionState.OFFERED)
        )
        self.touched(link)
        self._turn()

    def drop_connections(self) -> None:
        """What happened to the machine, no connection outlives: suspension, migration."""
        if self._events is not None and self._announce_reset():
            self._forget_connections()
            return
        for link in list(self.links.values()):
            link.reset()
            self._end(link)
            self.touched(link)
        self._turn()

    # Queues

    @property
    def is_overwhelmed(self) -> bool:
        """Whether the guest's packets wait until it has taken some of ours."""
        return len(self._resets) >= VIRTIO_WAITING_RESETS_MAX

    def _work_again(self) -> None:
        """Another turn, after everybody else's."""
        os.eventfd_write(self._again, 1)

    def work(self, events: int = 0) -> None:
        """Take what the guest sent, and give it what there is, both for a turn; for ``events``
        of an eventfd, or without one.
        """
        self._turn(self._transmit)

    def _turn(self, transmit: TxPoll | None = None) -> None:
        """Give the guest what there is; before that take what it sent, from ``transmit``."""
        if self._busy:  # what is asked for within a turn is part of it
            return
        self._busy = True
        try:
            if transmit is not None:
                index = TRANSMIT
                if transmit.run() and not self.is_overwhelmed:
                    self._work_again()
            if self._turns or self._resets:
                index = RECEIVE
                self._give()
        except RingError as error:
            self._break(index, error)
        finally:
            self._busy = False

    def _give(self) -> None:
        """Send the guest what there is, as long as it has buffers."""
        queue, turns = self._receive, self._turns
        if queue is None:
            return
        overwhelmed = self.is_overwhelmed
        budget = 2 * len(turns) + len(self._resets) + 1
        while (turns or self._resets) and budget and queue.has_buffers():
            budget -= 1
            if self._resets:
                queue.send_raw(self._resets.popleft())
                continue
            link = turns.popleft()
            link.queued = False
            if queue.send(link) and self._transmit is not None:
                self._transmit.pace.answered()
            if queue.publish():  # the guest works on these while we fetch more
                self._vrings[RECEIVE].call()
            if link.say and link.send.is_full and not link.asks_again:
                link.asks_again = True
                self._loop.call_later(VIRTIO_CREDIT_RETRY_SECONDS, partial(self._ask_again, link))
            self.touched(link)
            if link.state is ConnectionState.CLOSING:
                self._loop.call_later(
                    VIRTIO_CLOSE_TIMEOUT_SECONDS,
                    partial(self._give_up, link, ConnectionState.CLOSING),
                )
        if queue.publish():
            self._vrings[RECEIVE].call()
        queue.prepare()
        if not budget or (overwhelmed and not self.is_overwhelmed):
            self._work_again()

    def _ask_again(self, link: HostStream) -> None:
        """Linux says when packets are read; other guests need not before half of them is."""
        link.asks_again = False
        if link.state is _OPEN and link.send.is_full:
            link.send.look_again()
            self.touched(link)
            self._turn()

    def _break(self, index: int, error: RingError) -> None:
        """The driver has broken a ring.  It harms itself, and nobody else."""
        log.warning("context %d: ring %d is given up: %s", self.cid, index, error)
        vring = self._vrings[index]
        self.stop_ring(index)
        vring.report_error()
        self._forget_connections()

    def _announce_reset(self) -> bool:
        """Tell the guest that all connections are gone; False when it does not listen."""
        ring, vring = self._events, self._vrings[EVENT]
        assert ring is not None
        try:
            chain = ring.pop()
            if chain is None:
                return False
            note, _, parts = chain
            if not parts or len(parts[0]) < len(TRANSPORT_RESET):
                raise RingError("a buffer of the event queue that takes no event")
            parts[0][: len(TRANSPORT_RESET)] = TRANSPORT_RESET
            ring.push(note, len(TRANSPORT_RESET))
            if ring.publish():
                vring.call()
        except RingError as error:
            self._break(EVENT, error)
        return True

    # Packets of the guest, as TransmitQueue's receiver

    def receive(self, header: Header, link: HostStream | None) -> None:
        """As :class:`.transmit_queue.Receiver` says."""
        if link is None or link.type != header.type or header.src_cid != self.cid:
            if header.op == Op.REQUEST and link is None and header.src_cid == self.cid:
                self._request(header)
            elif header.op != Op.RST:
                self._refuse(header)
            return
        if header.op == Op.REQUEST and link.state in (
            ConnectionState.CLOSING,
            ConnectionState.GONE,
        ):
            # The guest has forgotten the old connection; so do we, as its RST would hit the new.
            link.forget()
            self._end(link)
            self._remove(link)
            self._request(header)
            return
        do = link.hear(header.op, header.flags)
        if do:
            self._do(link, do)
        self.touched(link)

    def touched(self, link: HostStream) -> None:
        """As :class:`.transmit_queue.Receiver` says."""
        state = link.state
        if state is not _OPEN and (state is _GONE_STATE or state is _CLOSING):
            self._end(link)
            if link.is_silent:
                self._remove(link)
                return
        elif link.has_waiting != link.watches_room:
            # A socket nearly always has room: that is news only if something waits for it.
            link.watches_room = link.has_waiting
            assert link.sock is not None
            events = _WRITING if link.watches_room else _READING
            self._loop.change(link.sock.fileno(), events)
        if not link.queued and link.has_something:
            link.queued = True
            self._turns.append(link)

    def _request(self, header: Header) -> None:
        kind = KINDS.get(header.type)  # type: ignore[call-overload]
        if kind is None or len(self.links) >= VIRTIO_CONNECTIONS_MAX or header.dst_cid >> 32:
            self._refuse(header)
            return
        peer = (header.dst_cid, header.dst_port)
        link = HostStream(
            ConnectionState.ASKED, Type(header.type), peer, header.src_port, self._credit()
        )
        link.send.update(header.buf_alloc, header.fwd_cnt)
        self.links[(*peer, header.src_port)] = link
        self._attempts[link] = lambda: None
        give_up = self._fabric.connect(
            int(kind), header.src_port, peer, partial(self._connected, link)
        )
        if link in self._attempts:
            self._attempts[link] = give_up
            self._loop.call_later(
                VIRTIO_CONNECT_TIMEOUT_SECONDS, partial(self._give_up, link, ConnectionState.ASKED)
            )

    def _connected(self, link: HostStream, sock: socket.socket | None) -> None:
        self._attempts.pop(link, None)
        if sock is None:
            link.host_refuses()
        else:
            link.host_accepts()
            self._join(link, sock)
        self.touched(link)
        self._turn()

    def _join(self, link: HostStream, sock: socket.socket) -> None:
        link.join(sock, self._marker)
        link.watched = True
        self._loop.watch_for(sock.fileno(), partial(self._ready, link), _READING)

    def _refuse(self, header: Header) -> None:
        """An RST, in answer to something that is no RST and has no connection."""
        answer = Header(
            header.dst_cid, header.src_cid, header.dst_port, header.src_port,
            type=header.type, op=Op.RST,
        )  # fmt: skip
        self._resets.append(answer.encode())

    def _do(self, link: HostStream, do: Action) -> None:
        if do & Action.ACCEPT:
            answer = self._answers.pop(link)
            assert link.sock is not None
            self._join(link, link.sock)
            answer(0)
        if do & Action.REFUSE:
            self._answers.pop(link)(errno.ECONNRESET)
        if do & Action.END_READING:
            link.end_reading()
        if do & Action.END_WRITING or do & Action.END_READING:
            link.settle()

    # Sockets of the host

    def _ready(self, link: HostStream, events: int) -> None:
        if events & _READABLE:
            link.readable = True
            if events & _HUNG_UP:
                link.hung_up = True
                if events & _GONE:
                    link.gone = True
        if events & select.EPOLLOUT and link.has_waiting:
            link.flush()
        self.touched(link)
        self._turn()

    # Ends

    def _give_up(self, link: HostStream, state: ConnectionState) -> None:
        """It has been in this state for too long."""
        if link.state is state and self.links.get((*link.peer, link.guest_port)) is link:
            link.reset()
            self.touched(link)
            self._turn()

    def _end(self, link: HostStream) -> None:
        """Close the host's side."""
        give_up = self._attempts.pop(link, None)
        if give_up is not None:
            give_up()
        answer = self._answers.pop(link, None)
        if answer is not None:
            answer(errno.ECONNRESET)
        if link.sock is not None:
            if link.watched:
                self._loop.unwatch(link.sock.fileno())
            link.close()

    def _remove(self, link: HostStream) -> None:
        key = (*link.peer, link.guest_port)
        if self.links.get(key) is link:
            del self.links[key]

    def _forget_connections(self) -> None:
        """They are no more, and the guest knows."""
        for link in list(self.links.values()):
            link.forget()
            self._end(link)
        self.links.clear()
        self._turns.clear()
        self._resets.clear()

    def _credit(self) -> int:
        full = len(self.links) < VIRTIO_LARGE_BUFFERS_MAX
        return VIRTIO_BUFFER_BYTES if full else VIRTIO_SMALL_BUFFER_BYTES
