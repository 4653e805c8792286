"""Driver of a split virtqueue, and front end of vhost-user: a simulated guest.

For tests and benchmarks of the virtio device without a virtual machine.  The driver is correct,
but tests can also write anything to its memory.
"""

from __future__ import annotations

import array
import mmap
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from socket import SCM_RIGHTS, SOL_SOCKET
from typing import Protocol

from vsockets.devices.vhost_user import messages
from vsockets.devices.vhost_user.messages import RequestType
from vsockets.devices.virtio.ring import DESCRIPTOR, INDIRECT, NEXT, WRITE, fence

#: Address of the memory for the guest, and for the simulated front end.
GUEST_BASE = 0x4000_0000
USER_BASE = 0x7F00_0000_0000

_MASK = 0xFFFF


class Memory:
    """``size`` bytes of memory in ``regions`` equal regions, allocated from the start."""

    def __init__(self, size: int, regions: int = 1) -> None:
        self.size = size
        self.fd = os.memfd_create("played guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self._map = mmap.mmap(self.fd, size)
        self.view = memoryview(self._map)
        self._free = 0
        step = size // regions
        #: guest address, size, user address, offset
        self.regions = [(GUEST_BASE + at, step, USER_BASE + at, at) for at in range(0, size, step)]

    def allocate(self, size: int, alignment: int = 16) -> int:
        """Allocate ``size`` bytes; return their offset."""
        start = -(-self._free // alignment) * alignment
        self._free = start + size
        if self._free > self.size:
            raise MemoryError(f"the played guest has {self.size} bytes")
        return start

    def close(self) -> None:
        """Unmap the memory, unless a view of it exists."""
        os.close(self.fd)


class DriverRing:
    """A split ring of ``size`` entries; with ``indirect`` each chain has a table of its own."""

    def __init__(
        self, memory: Memory, size: int, event_index: bool = True, indirect: bool = False
    ) -> None:
        self.size = size
        self.memory = memory
        self.event_index = event_index
        self.descriptors = memory.allocate(16 * size)
        self.available = memory.allocate(6 + 2 * size)
        self.used = memory.allocate(6 + 8 * size)
        self._available = memory.view[self.available :][: 6 + 2 * size].cast("H")
        self._used = memory.view[self.used :][: 6 + 8 * size].cast("H")
        self.elements = memory.view[self.used + 4 :][: 8 * size].cast("Q")
        self._free = list(range(size))
        self._chains: dict[int, list[int]] = {}
        self._tables: list[int] | None = None
        if indirect:
            self._tables = [memory.allocate(32 * 16) for _ in range(size)]
        self.next = 0  #: the next available entry
        self._kicked = 0
        self.taken = 0  #: the next used entry
        self.kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.error = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    @property
    def base(self) -> int:
        """Position at which the device begins, in vhost-user's form."""
        return self.taken

    def start_at(self, base: int) -> None:
        """Begin with the entry ``base``, as if the ring had been in use."""
        self.next = self._kicked = self.taken = base
        self._available[1] = self._used[1] = base
        if self.event_index:
            self._available[2 + self.size] = self._used[2 + 4 * self.size] = base

    def write_descriptor(
        self, index: int, address: int, length: int, flags: int, following: int
    ) -> None:
        """Write a descriptor without any check."""
        DESCRIPTOR.pack_into(
            self.memory.view, self.descriptors + 16 * index, address, length, flags, following
        )

    def has_room(self, parts: int) -> bool:
        """Return whether a chain of ``parts`` can be added."""
        return len(self._free) >= (1 if self._tables is not None else parts)

    def add(self, parts: Sequence[tuple[int, int]], writable: bool) -> int:
        """Add a chain of ``parts``, offsets and lengths; return its first descriptor."""
        if self._tables is not None:
            head = self._free.pop()
            table = self._tables[head]
            for number, (offset, length) in enumerate(parts):
                flags = (WRITE if writable else 0) | (NEXT if number + 1 < len(parts) else 0)
                DESCRIPTOR.pack_into(
                    self.memory.view,
                    table + 16 * number,
                    GUEST_BASE + offset,
                    length,
                    flags,
                    number + 1,
                )
            self.write_descriptor(head, GUEST_BASE + table, 16 * len(parts), INDIRECT, 0)
            self._chains[head] = [head]
        else:
            chain = [self._free.pop() for _ in parts]
            head = chain[0]
            self._chains[head] = chain
            for number, (offset, length) in enumerate(parts):
                last = number + 1 == len(parts)
                flags = (WRITE if writable else 0) | (0 if last else NEXT)
                following = 0 if last else chain[number + 1]
                self.write_descriptor(chain[number], GUEST_BASE + offset, length, flags, following)
        self.make_available(head)
        return head

    def make_available(self, head: int) -> None:
        """Write a number to the available ring."""
        self._available[2 + self.next % self.size] = head & _MASK
        self.next = self.next + 1 & _MASK

    def publish(self) -> bool:
        """Publish added chains; kick if the device requested it, and return whether."""
        old, new = self._kicked, self.next
        self._available[1] = new
        fence()
        self._kicked = new
        if self.event_index:
            wanted = self._used[2 + 4 * self.size]
            wants = (new - wanted - 1) & _MASK < (new - old) & _MASK
        else:
            wants = not self._used[0] & 1
        if wants:
            os.eventfd_write(self.kick, 1)
        return wants

    def collect(self) -> list[tuple[int, int]]:
        """Return the chains used since the last call, and the numbers of bytes written."""
        used = []
        end = self._used[1]
        while self.taken != end:
            element = self.elements[self.taken % self.size]
            head = element & 0xFFFF_FFFF
            used.append((head, element >> 32))
            self._free += self._chains.pop(head)
            self.taken = self.taken + 1 & _MASK
        return used

    def enable_notification(self) -> bool:
        """Request a notification for the next used chain; return whether one exists already."""
        if self.event_index:
            self._available[2 + self.size] = self.taken
            fence()
        return self._used[1] != self.taken

    def close(self) -> None:
        """Close the eventfds."""
        for fd in (self.kick, self.call, self.error):
            os.close(fd)


class Ring(Protocol):
    """Interface of a ring to the front end."""

    size: int
    descriptors: int
    available: int
    used: int
    kick: int
    call: int
    error: int

    @property
    def base(self) -> int:
        """Position at which the device begins, in vhost-user's form."""


class FrontEnd:
    """Front end of vhost-user: the side of a virtual machine's monitor."""

    def __init__(self, path: Path | str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(10)
        self.sock.connect(os.fspath(path))

    def send_request(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a request that has no reply."""
        self._send(messages.encode(request, payload), fds)

    def request_ack(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Send a request with REPLY_ACK; return 0 or the errno."""
        self._send(messages.encode(request, payload, int(messages.Flag.NEED_REPLY)), fds)
        (status,) = messages.U64.unpack(self._receive())
        return int(status)

    def request_reply(self, request: int, payload: bytes = b"") -> bytes:
        """Send a request that has a reply; return its payload."""
        self._send(messages.encode(request, payload), ())
        return self._receive()

    def negotiate(self, features: int, protocol_features: int) -> int:
        """Negotiate features; return those of them that the device offers."""
        (offered,) = messages.U64.unpack(self.request_reply(RequestType.GET_FEATURES))
        (protocol,) = messages.U64.unpack(self.request_reply(RequestType.GET_PROTOCOL_FEATURES))
        self.send_request(
            RequestType.SET_PROTOCOL_FEATURES, messages.U64.pack(protocol & protocol_features)
        )
        self.send_request(RequestType.SET_OWNER)
        features &= offered
        self.send_request(
            RequestType.SET_FEATURES, messages.U64.pack(features | messages.F_PROTOCOL_FEATURES)
        )
        return int(features)

    def set_memory(self, memory: Memory) -> None:
        """Share the memory with the device, as one table."""
        table = messages.REGIONS.pack(len(memory.regions), 0)
        for region in memory.regions:
            table += messages.REGION.pack(*region)
        self.send_request(RequestType.SET_MEM_TABLE, table, [memory.fd] * len(memory.regions))

    def set_ring(
        self, index: int, ring: Ring, base: int | None = None, enable: bool = True
    ) -> None:
        """Set up and start a ring, at ``base`` or at the driver's position."""
        state = messages.VRING_STATE
        self.send_request(RequestType.SET_VRING_NUM, state.pack(index, ring.size))
        self.send_request(
            RequestType.SET_VRING_BASE, state.pack(index, ring.base if base is None else base)
        )
        address = messages.VRING_ADDR.pack(
            index,
            0,
            USER_BASE + ring.descriptors,
            USER_BASE + ring.used,
            USER_BASE + ring.available,
            0,
        )
        self.send_request(RequestType.SET_VRING_ADDR, address)
        number = messages.U64.pack(index)
        self.send_request(RequestType.SET_VRING_ERR, number, [ring.error])
        self.send_request(RequestType.SET_VRING_KICK, number, [ring.kick])
        self.send_request(RequestType.SET_VRING_CALL, number, [ring.call])
        if enable:
            self.send_request(RequestType.SET_VRING_ENABLE, state.pack(index, 1))

    def stop_ring(self, index: int) -> int:
        """Stop a ring; return its base."""
        answer = self.request_reply(RequestType.GET_VRING_BASE, messages.VRING_STATE.pack(index, 0))
        return int(messages.VRING_STATE.unpack(answer)[1])

    def close(self) -> None:
        """Disconnect."""
        self.sock.close()

    def _send(self, data: bytes, fds: Sequence[int]) -> None:
        ancillary = [(SOL_SOCKET, SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([data], ancillary)

    def _receive(self) -> bytes:
        header = self._exactly(messages.HEADER.size)
        _, _, size = messages.HEADER.unpack(header)
        return self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.sock.recv(size - len(data))
            if not more:
                raise ConnectionError("the device has ended the vhost-user connection")
            data += more
        return data
