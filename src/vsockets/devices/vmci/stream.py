"""Established stream: transfer between a queue pair and a socket, and the end of a stream.

Guest to host, the guest sends WROTE when its queue stops being empty.  A guest with small, frequent
writes would send WROTE each time, which costs both sides more than the data.  So while data keeps
coming, the device consumes the last byte without publishing this: the queue never looks empty,
the guest sends no WROTE, and the device polls the queue every :data:`VMCI_QUEUE_POLL_SECONDS`, or
without pause while a reply is expected.  After some polls without data it publishes the byte and
polls once more, so that no wake-up is lost.

Host to guest, the device does the same with the room: it leaves a byte unused, so that the queue
never looks full, the guest sends no READ, and the device polls.  If the guest has read nothing for
some polls, the device fills the last byte and waits for READ.

How streams end, by the side that begins:

====================  ====================================================================
guest shuts down      SHUTDOWN arrives; the device sends the data in the queue, then shuts
                      the socket down
guest closes          only the queue pair is detached, later: the device copies its data
                      before the guest gets its pages back, and sends the copy afterwards
program shuts down    end of file on the socket: the device sends SHUTDOWN after all data
program closes        the device sends SHUTDOWN for both directions and the event that the
                      peer has detached; the guest reads the rest and detaches
====================  ====================================================================
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable
from socket import SHUT_RD, SHUT_RDWR, SHUT_WR

from ..capture import CaptureSink
from ..guest_memory import pull, push
from ..limits import (
    VMCI_IDLE_QUEUE_POLLS_MAX,
    VMCI_NEXT_WRITE_POLL_SECONDS,
    VMCI_PUMP_ROUNDS_PER_TURN,
    VMCI_QUEUE_POLL_SECONDS,
    VMCI_REMINDER_SECONDS,
    VMCI_REPLY_POLL_SECONDS,
)
from ..loop import DeviceLoop
from .flow_control import QueueNotifications, QueueState, Send
from .packets import Kind, Shutdown
from .queue_pair import BrokenQueue, QueuePair

_IN, _OUT = select.EPOLLIN | select.EPOLLRDHUP, select.EPOLLOUT
_HUP = select.EPOLLHUP | select.EPOLLERR

#: Number of WROTE packets after which the device polls the guest's queue.
_FLOWING = 3


def _never() -> bool:
    return False


class Stream:
    """An established VMCI stream; takes ownership of ``sock``.

    ``sock`` is the other end of the program's socket.  ``hung_up`` is called when the program has
    closed its socket, ``finished`` when ``sock`` is closed.  ``capture`` records the payload
    between ``guest`` and ``peer``, each a CID and a port.
    """

    def __init__(
        self,
        loop: DeviceLoop,
        sock: socket.socket,
        queue_pair: QueuePair,
        send: Send,
        protocol_v1: bool,
        hung_up: Callable[[], None],
        finished: Callable[[], None],
        capture: CaptureSink,
        guest: tuple[int, int],
        peer: tuple[int, int],
    ) -> None:
        self._loop = loop
        self._sock = sock
        self.queue_pair: QueuePair | None = queue_pair
        self._in, self._out = queue_pair.inbound, queue_pair.outbound
        self._send = send
        self._flow: QueueState | QueueNotifications = (
            QueueNotifications(send) if protocol_v1 else QueueState(send)
        )
        self._may_poll = not protocol_v1
        self._hung_up, self._finished = hung_up, finished
        self._capture, self._guest, self._peer = capture, guest, peer
        self._reading = self._writing = True  # reading from the socket, writing to it
        self._guest_finished = False  # the guest has sent its last data
        self._end_sent = False
        self.was_used = False  #: the guest has sent a packet
        self._rest = memoryview(b"")  # copied from a detached queue pair
        self._wrotes = 0
        self._polls_left = 0  # 0: the guest's queue is not polled
        self._reserved = int(self._may_poll)  # bytes of the guest's room that are left unused
        self._room_polls_left = 0  # 0: there is room, or READ will come
        self._consumed_before = 0  # the guest's position at the first of these polls
        self._interest = _IN
        self._yielded = False
        self._unread: int | None = None  # the guest's position when data was written without WROTE

    def start(self) -> None:
        """Start the transfer in both directions."""
        self._loop.watch_for(self._sock.fileno(), self._on_ready, self._interest)
        self._flow.on_empty()

    # Events

    def receive(self, kind: int, value: int) -> None:
        """Handle a packet of the guest."""
        if self.queue_pair is None:
            return
        self.was_used = True
        try:
            if kind == Kind.WROTE:
                self._wrotes += 1
                self._flow.receive(kind, False, False)
                self._pump_in()
            elif kind == Kind.READ:
                self._flow.receive(kind, False, False)
                self._reserved = int(self._may_poll)
                self._resume_reading()
            elif kind in (Kind.WAITING_READ, Kind.WAITING_WRITE):
                room = self._in.ready() < self._in.size - 1
                self._flow.receive(kind, not self._out.is_empty, room)
                if not room:
                    self._pump_in()
            elif kind == Kind.SHUTDOWN:
                self._on_guest_shutdown(value)
            elif kind == Kind.RST:
                self._end_sent = True
                self._on_guest_shutdown(Shutdown.SEND | Shutdown.RECEIVE)
        except BrokenQueue:
            self.abort()

    def on_detach(self) -> None:
        """Copy the unread data of a queue pair that the guest detaches.

        The guest reuses the pages once this method has returned.
        """
        if self.queue_pair is None:
            return
        self._polls_left = 0
        with contextlib.suppress(BrokenQueue):
            self._copy_rest()
        self.queue_pair = None
        self._reading = False
        self._end_sent = True
        self._flush_rest()

    def abort(self) -> None:
        """Close the stream for both sides at once, and discard unsent data."""
        self._rest = memoryview(b"")
        with contextlib.suppress(OSError):
            self._sock.shutdown(SHUT_RDWR)
        self._hang_up()
        self._close()

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes that the guest has sent and received."""
        return self._in.moved, self._out.moved

    @property
    def held_bytes(self) -> int:
        """Number of bytes copied from a detached queue pair that wait for room in the socket."""
        return len(self._rest)

    def _on_ready(self, events: int) -> None:
        try:
            if self.queue_pair is None:
                if events & (_HUP | _OUT):
                    self._flush_rest()
                return
            if events & _OUT:
                self._pump_in()
            if events & (_IN | _HUP) and self._sock.fileno() >= 0:
                if self._reading:
                    self._pump_out(events)
                elif events & _HUP:
                    self._hang_up()
        except BrokenQueue:
            self.abort()

    # Guest to socket

    def _pump_in(self) -> None:
        inbound = self._in
        if not self._writing:
            # The program no longer reads; the guest must not wait for room.
            inbound.consume(inbound.ready())
            self._flow.on_consumed(inbound.publish(), inbound.position)
            return
        moved = False
        for _ in range(VMCI_PUMP_ROUNDS_PER_TURN):
            ready = inbound.ready()
            if not ready:
                break
            try:
                sent = push(self._sock, window := inbound.window(ready))
            except OSError:
                self._on_socket_closed()
                return
            if not sent:
                self._flow.on_consumed(inbound.publish(), inbound.position)
                self._set_interest(self._interest | _OUT)
                return
            moved = True
            if self._capture.recorders:
                self._capture.stream(self._guest, self._peer, window, sent)
            inbound.consume(sent)
            self._flow.on_consumed(inbound.publish(self._withheld()), inbound.position)
        else:
            self._yield()
        if self._interest & _OUT:
            self._set_interest(self._interest & ~_OUT)
        if self._polls_left or self._is_flowing():
            self._schedule_poll(moved)
        elif not ready:
            self._on_drained()

    def _on_drained(self) -> None:
        if self._guest_finished and self._writing:
            self._writing = False
            with contextlib.suppress(OSError):
                self._sock.shutdown(SHUT_WR)
        elif not self._guest_finished:
            self._flow.on_empty()

    def _on_socket_closed(self) -> None:
        """Discard the guest's data after the program has closed or shut down receiving."""
        self._writing = False
        self._polls_left = 0
        self._in.consume(self._in.ready())
        self._flow.on_consumed(self._in.publish(), self._in.position)
        if not self._end_sent:
            self._send(Kind.SHUTDOWN, Shutdown.RECEIVE, 0)

    # Polling

    def _withheld(self) -> int:
        return 1 if self._polls_left or self._is_flowing() else 0

    def _is_flowing(self) -> bool:
        return self._may_poll and self._wrotes >= _FLOWING and not self._guest_finished

    def _schedule_poll(self, moved: bool) -> None:
        if not self._polls_left:
            self._loop.call_later(VMCI_QUEUE_POLL_SECONDS, self._poll)
        if moved or not self._polls_left:
            self._polls_left = VMCI_IDLE_QUEUE_POLLS_MAX

    def _poll(self) -> None:
        if not self._polls_left or self.queue_pair is None or not self._writing:
            self._polls_left = 0
            return
        try:
            if self._polls_left == 1 or self._guest_finished:
                # Stop polling and publish the byte.  Data since the last poll came without WROTE.
                self._polls_left = self._wrotes = 0
                self._flow.on_consumed(self._in.publish(), self._in.position)
                self._pump_in()
                return
            self._polls_left -= 1
            if self._in.ready() and not self._interest & _OUT:
                self._pump_in()
        except BrokenQueue:
            self.abort()
            return
        if self._polls_left:
            self._loop.call_later(VMCI_QUEUE_POLL_SECONDS, self._poll)

    def _poll_for_reply(self) -> bool:
        """Poll the guest's queue for a reply once; return whether to stop polling."""
        if not self._polls_left or self.queue_pair is None or not self._writing:
            return True
        try:
            if not self._in.ready():
                return False
            self._pump_in()
            # The program's next write is as near: a sleep and a wake-up would take as long.
            self._loop.spin(_never, VMCI_NEXT_WRITE_POLL_SECONDS)
        except BrokenQueue:
            self.abort()
        return True

    # Socket to guest

    def _pump_out(self, events: int = 0) -> None:
        outbound = self._out
        for _ in range(VMCI_PUMP_ROUNDS_PER_TURN):
            free = outbound.free() - self._reserved
            if free <= 0:
                self._set_interest(self._interest & ~_IN, events & _HUP)
                self._wait_for_room()
                return
            received = pull(self._sock, window := outbound.window(free))
            if received is None:
                return
            if not received:
                self._end_of_file()
                return
            if self._capture.recorders:
                self._capture.stream(self._peer, self._guest, window, received)
            was_empty = outbound.produce(received)
            self._flow.on_produced(was_empty, outbound.position)
            if not was_empty and self._unread is None:
                self._unread = outbound.consumed
                self._loop.call_later(VMCI_REMINDER_SECONDS, self._remind)
            if self._polls_left:
                self._polls_left = VMCI_IDLE_QUEUE_POLLS_MAX
                self._loop.spin(self._poll_for_reply, VMCI_REPLY_POLL_SECONDS)

    def _wait_for_room(self) -> None:
        if not self._reserved:
            self._flow.on_full()
        elif not self._room_polls_left:
            self._room_polls_left, self._consumed_before = (
                VMCI_IDLE_QUEUE_POLLS_MAX,
                self._out.consumed,
            )
            self._loop.call_later(VMCI_QUEUE_POLL_SECONDS, self._poll_for_room)

    def _poll_for_room(self) -> None:
        polls_left, self._room_polls_left = self._room_polls_left, 0
        if not self._reading or self.queue_pair is None:
            return
        try:
            if self._out.consumed != self._consumed_before:
                self._resume_reading()
            elif polls_left > 1:
                self._room_polls_left = polls_left - 1
                self._loop.call_later(VMCI_QUEUE_POLL_SECONDS, self._poll_for_room)
            else:
                # Stop polling: once the queue is full, the guest sends READ.
                self._reserved = 0
                self._resume_reading()
        except BrokenQueue:
            self.abort()

    def _remind(self) -> None:
        """Notify the guest again if it has read nothing.

        A reader in the guest may wait for more bytes than there were at the first notification
        (SO_RCVLOWAT).
        """
        unread, self._unread = self._unread, None
        if self.queue_pair is None or self._end_sent:
            return
        try:
            if self._out.consumed == unread and not self._out.is_empty:
                self._flow.on_produced(True, self._out.position)
        except BrokenQueue:
            self.abort()

    def _resume_reading(self) -> None:
        if self._reading:
            self._set_interest(self._interest | _IN)
            self._pump_out()

    def _end_of_file(self) -> None:
        self._reading = False
        self._set_interest(self._interest & ~_IN)
        poll = select.poll()
        poll.register(self._sock, 0)
        if poll.poll(0):
            self._hang_up()
        elif not self._end_sent:
            self._send(Kind.SHUTDOWN, Shutdown.SEND, 0)

    def _hang_up(self) -> None:
        """Report to the guest that the program has closed; the guest can still read all data."""
        self._reading = self._writing = False
        self._polls_left = 0
        self._loop.unwatch(self._sock.fileno())
        self._interest = 0
        if self.queue_pair is None:
            self._close()
        elif not self._end_sent:
            self._end_sent = True
            self._send(Kind.SHUTDOWN, Shutdown.SEND | Shutdown.RECEIVE, 0)
            self._hung_up()

    # The guest's end

    def _on_guest_shutdown(self, mode: int) -> None:
        if mode & Shutdown.RECEIVE and self._reading:
            self._reading = False
            self._set_interest(self._interest & ~_IN)
            with contextlib.suppress(OSError):
                self._sock.shutdown(SHUT_RD)
        if mode & Shutdown.SEND and not self._guest_finished:
            self._guest_finished = True
            self._polls_left = 0
            self._pump_in()

    def _copy_rest(self) -> None:
        if not self._writing:
            return
        parts: list[bytes] = []
        while ready := self._in.ready():
            views = self._in.window(ready)
            parts += map(bytes, views)
            self._in.consume(sum(len(view) for view in views))
            if sum(len(part) for part in parts) >= self._in.size:
                break  # the guest still writes
        self._rest = memoryview(b"".join(parts))
        if self._capture.recorders:
            self._capture.stream(self._guest, self._peer, (self._rest,), len(self._rest))

    def _flush_rest(self) -> None:
        while self._rest:
            try:
                sent = push(self._sock, [self._rest])
            except OSError:
                break
            if not sent:
                self._set_interest(_OUT)
                return
            self._rest = self._rest[sent:]
        self._close()

    def _close(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.unwatch(self._sock.fileno())
            self._sock.close()
            self._rest = memoryview(b"")
            self._reading = self._writing = False
            self._finished()

    # The loop

    def _set_interest(self, interest: int, hung_up: int = 0) -> None:
        if hung_up:  # a hang-up would be reported again and again
            self._loop.unwatch(self._sock.fileno())
            self._interest = 0
        elif interest != self._interest and self._sock.fileno() >= 0:
            if self._interest or self._loop.watches(self._sock.fileno()):
                self._loop.change(self._sock.fileno(), interest)
            else:
                self._loop.watch_for(self._sock.fileno(), self._on_ready, interest)
            self._interest = interest

    def _yield(self) -> None:
        """Schedule the rest of the guest's data after the turns of other streams."""
        if not self._yielded:
            self._yielded = True
            self._loop.call_later(0, self._continue)

    def _continue(self) -> None:
        self._yielded = False
        if self.queue_pair is None or self._sock.fileno() < 0:
            return
        try:
            self._pump_in()
        except BrokenQueue:
            self.abort()
