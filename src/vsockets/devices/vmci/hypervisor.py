"""Hypercalls of one guest, and routing of the guest's datagrams.

The guest is hostile: :mod:`.limits` bounds the memory of the device that a guest can occupy.  The
guest's context is the one to which the device was attached; the source context in a datagram is
ignored.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from typing import Protocol

from ...model.constants import VMADDR_CID_HYPERVISOR
from ..guest_memory import BadAddress
from ..limits import VMCI_DOORBELLS_MAX, VMCI_QUEUE_PAIR_MAX_BYTES, VMCI_QUEUE_PAIRS_MAX
from . import packets
from .device import VmciDevice
from .packets import (
    LAST_HYPERCALL,
    Code,
    Datagram,
    Event,
    Handle,
    Hypercall,
    Packet,
    context_event,
    queue_pair_event,
)
from .queue_pair import QueuePair, page_count

log = logging.getLogger(__name__)

_ALLOC = struct.Struct("<IIIIQQQ")
_HANDLE = struct.Struct("<II")
_LINK = struct.Struct("<IIQ")
_ATTACH_ONLY = 1
_ALL_FLAGS = 0xF
_MOST_QUERIED = 31


class Sockets(Protocol):
    """Interface of the guest's vSockets, which the hypervisor calls."""

    def receive(self, peer: int, packet: Packet) -> int | None:
        """Handle a control packet from the guest to the context ``peer``.

        Return the result for the guest, a number of bytes or a negative :class:`.Code`; or None if
        :meth:`.VmciDevice.finish` is called with the result.
        """

    def send_datagram(self, port: int, destination: tuple[int, int], payload: bytes) -> int:
        """Send a datagram from the guest's ``port`` to ``destination`` (CID, port).

        Return a negative :class:`.Code`, or the number of bytes sent, header included.
        """

    def expects(self, handle: Handle, sizes: tuple[int, int]) -> bool:
        """Return whether the guest may attach to the queue pair ``handle`` that the device offered.

        ``sizes`` are those of the guest's produce queue and consume queue, in bytes.
        """

    def on_detach(self, queue_pair: QueuePair) -> None:
        """Stop using a queue pair; the guest reuses its memory once this method has returned."""


class Hypervisor:
    """Hypervisor of the guest ``cid``; set ``device`` and ``sockets`` before use."""

    device: VmciDevice
    sockets: Sockets

    def __init__(self, cid: int) -> None:
        self.cid = cid
        self._queue_pairs: dict[Handle, QueuePair] = {}
        self._queue_pair_memory = 0
        self._bitmap: memoryview | None = None
        self._doorbells: dict[Handle, int] = {}
        self._hypercalls: dict[int, Callable[[bytes], int]] = {
            Hypercall.RESOURCES_QUERY: self._query_resources,
            Hypercall.GET_CONTEXT_ID: lambda _: self.cid,
            Hypercall.SET_NOTIFY_BITMAP: self._set_bitmap,
            Hypercall.DOORBELL_LINK: self._link_doorbell,
            Hypercall.DOORBELL_UNLINK: self._unlink_doorbell,
            Hypercall.DOORBELL_NOTIFY: self._notify_doorbell,
            Hypercall.EVENT_SUBSCRIBE: self._subscribe,
            Hypercall.EVENT_UNSUBSCRIBE: self._subscribe,
            Hypercall.QUEUEPAIR_ALLOC: self._alloc,
            Hypercall.QUEUEPAIR_DETACH: self._detach,
        }

    def perform(self, datagram: Datagram) -> int | None:
        """Perform the hypercall, or deliver the datagram, that the guest has sent.

        Return the result for the guest; negative results are errors (:class:`.Code`).  Return None
        if :meth:`.VmciDevice.finish` is called with the result.
        """
        destination, source, payload = datagram
        if destination.context == VMADDR_CID_HYPERVISOR:
            hypercall = self._hypercalls.get(destination.resource)
            if hypercall is not None:
                return hypercall(payload)
            if destination.resource <= LAST_HYPERCALL:
                return Code.INVALID_RESOURCE
            control = packets.HYPERVISOR_RESOURCE
        else:
            control = packets.RESOURCE
        if destination.resource == control and source.resource == packets.RESOURCE:
            packet = Packet.decode(payload)
            if packet is None:
                return Code.INVALID_ARGS
            if self.device.backpressured:
                return Code.NO_RESOURCES
            return self.sockets.receive(destination.context, packet)
        return self.sockets.send_datagram(source.resource, destination, payload)

    @property
    def is_idle(self) -> bool:
        """Flag: true while the guest has no queue pair."""
        return not self._queue_pairs and not self._queue_pair_memory

    # Queue pairs and events of the guest

    def queue_pair(self, handle: Handle) -> QueuePair | None:
        """Return the guest's queue pair with the handle ``handle``, or None."""
        return self._queue_pairs.get(handle)

    def notify_detached(self, queue_pair: QueuePair) -> None:
        """Report to the guest that the peer has detached; the guest can still read the queue."""
        handle = queue_pair.handle
        if self._queue_pairs.get(handle) is queue_pair:
            event = queue_pair_event(self.cid, Event.QP_PEER_DETACH, handle, queue_pair.peer)
            self.device.deliver(event)

    def notify_resumed(self) -> None:
        """Report to the guest that no stream survived a suspension or migration."""
        self.device.deliver(context_event(self.cid, Event.QP_RESUMED, self.cid))

    def notify_removed(self, cid: int) -> None:
        """Report to the guest that the context ``cid`` was removed."""
        self.device.deliver(context_event(self.cid, Event.CTX_REMOVED, cid))

    def reset(self) -> None:
        """Release all queue pairs and doorbells of a guest that restarts.

        The guest's memory is still mapped.
        """
        for queue_pair in list(self._queue_pairs.values()):
            self.sockets.on_detach(queue_pair)
        self._queue_pairs.clear()
        self._queue_pair_memory = 0
        self._bitmap = None
        self._doorbells.clear()

    def release_memory(self, address: int, size: int) -> None:
        """Release all queue pairs with pages in ``size`` bytes at ``address``.

        The client unmaps this memory afterwards.
        """
        for queue_pair in list(self._queue_pairs.values()):
            if queue_pair.pages.overlaps(address, size):
                self._release(queue_pair)
        self._bitmap = None

    # Hypercalls

    def _query_resources(self, payload: bytes) -> int:
        if len(payload) < _HANDLE.size:
            return Code.INVALID_ARGS
        count, _ = _HANDLE.unpack_from(payload)
        if count > _MOST_QUERIED or len(payload) < _HANDLE.size + 4 * count:
            return Code.INVALID_ARGS
        asked = struct.unpack_from(f"<{count}I", payload, _HANDLE.size)
        return sum(1 << place for place, number in enumerate(asked) if number in self._hypercalls)

    @staticmethod
    def _subscribe(payload: bytes) -> int:
        # Every guest gets all events that concern it.
        if len(payload) < _HANDLE.size:
            return Code.INVALID_ARGS
        event, _ = _HANDLE.unpack_from(payload)
        return Code.SUCCESS if event in Event.__members__.values() else Code.EVENT_UNKNOWN

    def _set_bitmap(self, payload: bytes) -> int:
        width = 8 if self.device.wide_pages else 4
        if len(payload) < width:
            return Code.INVALID_ARGS
        page = int.from_bytes(payload[:width], "little")
        size = self.device.page_size
        try:
            self._bitmap = self.device.memory.view(page * size, size)
        except BadAddress:
            return Code.INVALID_ARGS
        return Code.SUCCESS

    def _link_doorbell(self, payload: bytes) -> int:
        if len(payload) < _LINK.size:
            return Code.INVALID_ARGS
        context, resource, index = _LINK.unpack_from(payload)
        if index >= self.device.page_size or len(self._doorbells) >= VMCI_DOORBELLS_MAX:
            return Code.INVALID_ARGS
        handle = Handle(context, resource)
        if handle in self._doorbells:
            return Code.ALREADY_EXISTS
        self._doorbells[handle] = index
        return Code.SUCCESS

    def _unlink_doorbell(self, payload: bytes) -> int:
        if len(payload) < _HANDLE.size:
            return Code.INVALID_ARGS
        handle = Handle(*_HANDLE.unpack_from(payload))
        return Code.NOT_FOUND if self._doorbells.pop(handle, None) is None else Code.SUCCESS

    def _notify_doorbell(self, payload: bytes) -> int:
        # Only the guest itself notifies its doorbells; vSockets do not use them.
        if len(payload) < _HANDLE.size:
            return Code.INVALID_ARGS
        index = self._doorbells.get(Handle(*_HANDLE.unpack_from(payload)))
        if index is None:
            return Code.NOT_FOUND
        if self._bitmap is not None and index < len(self._bitmap):
            self._bitmap[index] = 1
            self.device.notify()
        return Code.SUCCESS

    # Queue pairs

    def _alloc(self, payload: bytes) -> int:  # noqa: C901 - a list of checks
        if len(payload) < _ALLOC.size:
            return Code.INVALID_ARGS
        context, resource, peer, flags, produce, consume, count = _ALLOC.unpack_from(payload)
        handle = Handle(context, resource)
        if flags & ~_ALL_FLAGS or not produce or not consume:
            return Code.INVALID_ARGS
        if max(produce, consume) > VMCI_QUEUE_PAIR_MAX_BYTES:
            return Code.NO_RESOURCES
        size = self.device.page_size
        if count != page_count(produce, consume, size):
            return Code.INVALID_ARGS
        width = 8 if self.device.wide_pages else 4
        if len(payload) - _ALLOC.size != count * width:
            return Code.INVALID_ARGS
        if handle in self._queue_pairs:
            return Code.ALREADY_EXISTS
        full = len(self._queue_pairs) >= VMCI_QUEUE_PAIRS_MAX
        if full or self._queue_pair_memory + count * size > VMCI_QUEUE_PAIR_MAX_BYTES:
            return Code.NO_RESOURCES
        attaching = bool(flags & _ATTACH_ONLY)
        # A guest creates queue pairs of its own, and attaches only to those that the device has
        # offered to it.
        if attaching != self.sockets.expects(handle, (produce, consume)):
            return Code.NOT_FOUND if attaching else Code.NO_ACCESS
        form = f"<{count}{'Q' if width == 8 else 'I'}"
        pages = [page * size for page in struct.unpack_from(form, payload, _ALLOC.size)]
        if len(set(pages)) != len(pages):
            return Code.INVALID_ARGS
        try:
            queue_pair = QueuePair(self.device.memory, handle, peer, produce, consume, pages, size)
        except BadAddress as error:
            log.info("queue pair with invalid page addresses: %s", error)
            return Code.INVALID_ARGS
        self._queue_pairs[handle] = queue_pair
        self._queue_pair_memory += queue_pair.pages.total_size
        return Code.QUEUEPAIR_ATTACHED if attaching else Code.QUEUEPAIR_CREATED

    def _detach(self, payload: bytes) -> int:
        if len(payload) < _HANDLE.size:
            return Code.INVALID_ARGS
        queue_pair = self._queue_pairs.get(Handle(*_HANDLE.unpack_from(payload)))
        if queue_pair is not None:
            self._release(queue_pair)
        # An unknown handle succeeds, too: after an error the guest would never reuse the pages.
        return Code.SUCCESS

    def _release(self, queue_pair: QueuePair) -> None:
        self.sockets.on_detach(queue_pair)
        del self._queue_pairs[queue_pair.handle]
        self._queue_pair_memory -= queue_pair.pages.total_size
