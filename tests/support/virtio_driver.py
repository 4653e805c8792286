"""The driver's side of a split virtqueue, and of vhost-user: a guest that is played.

For tests and benchmarks of the virtio device without a virtual machine.  It is an honest driver
that can be told to be a dishonest one: everything it puts into memory can be put there by hand.
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

#: Where memory lies for the guest, and for the front end that is played.
GUEST_BASE = 0x4000_0000
USER_BASE = 0x7F00_0000_0000

_MASK = 0xFFFF


class Memory:
    """``size`` bytes of memory, in ``regions`` equal regions, given out from the start."""

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
        """The offset of ``size`` bytes that nobody else has."""
        start = -(-self._free // alignment) * alignment
        self._free = start + size
        if self._free > self.size:
            raise MemoryError(f"the played guest has {self.size} bytes")
        return start

    def close(self) -> None:
        """Give it back to the system, as far as nobody looks at it."""
        os.close(self.fd)


class DriverRing:
    """A split ring of ``size`` entries; with ``indirect`` each chain is in a table of its own."""

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
        self._elements = memory.view[self.used + 4 :][: 8 * size].cast("Q")
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
        """Where the device is to begin, as vhost-user says it."""
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
        """Anything at all, in the descriptor table."""
        DESCRIPTOR.pack_into(
            self.memory.view, self.descriptors + 16 * index, address, length, flags, following
        )

    def has_room(self, parts: int) -> bool:
        """Whether a chain of ``parts`` can be added."""
        return len(self._free) >= (1 if self._tables is not None else parts)

    def add(self, parts: Sequence[tuple[int, int]], writable: bool) -> int:
        """Offer a chain: ``parts`` are offsets and lengths.  Returns its first descriptor."""
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
        """Put a number into the available ring."""
        self._available[2 + self.next % self.size] = head & _MASK
        self.next = self.next + 1 & _MASK

    def publish(self) -> bool:
        """Let the device see it; kicks if the device wants that, and returns whether."""
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
        """The chains that were used since the last time, and how many bytes were written."""
        used = []
        end = self._used[1]
        while self.taken != end:
            element = self._elements[self.taken % self.size]
            head = element & 0xFFFF_FFFF
            used.append((head, element >> 32))
            self._free += self._chains.pop(head)
            self.taken = self.taken + 1 & _MASK
        return used

    def want_call(self) -> bool:
        """Ask to be told of the next used chain; returns whether there is one already."""
        if self.event_index:
            self._available[2 + self.size] = self.taken
            fence()
        return self._used[1] != self.taken

    def close(self) -> None:
        """Close the eventfds."""
        for fd in (self.kick, self.call, self.error):
            os.close(fd)


class Ring(Protocol):
    """What the front end needs to know of a ring."""

    size: int
    descriptors: int
    available: int
    used: int
    kick: int
    call: int
    error: int

    @property
    def base(self) -> int:
        """Where the device is to begin, as vhost-user says it."""


class FrontEnd:
    """The vhost-user side of a virtual machine's monitor."""

    def __init__(self, path: Path | str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(10)
        self.sock.connect(os.fspath(path))

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a request that has no answer."""
        self._send(messages.encode(request, payload), fds)

    def order(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Send a request with REPLY_ACK; returns 0 or the errno."""
        self._send(messages.encode(request, payload, int(messages.Flag.NEED_REPLY)), fds)
        (status,) = messages.U64.unpack(self._receive())
        return int(status)

    def ask(self, request: int, payload: bytes = b"") -> bytes:
        """Send a request that has an answer; returns its payload."""
        self._send(messages.encode(request, payload), ())
        return self._receive()

    def negotiate(self, features: int, protocol_features: int) -> int:
        """Agree on features; returns those the device offers of them."""
        (offered,) = messages.U64.unpack(self.ask(RequestType.GET_FEATURES))
        (protocol,) = messages.U64.unpack(self.ask(RequestType.GET_PROTOCOL_FEATURES))
        self.tell(
            RequestType.SET_PROTOCOL_FEATURES, messages.U64.pack(protocol & protocol_features)
        )
        self.tell(RequestType.SET_OWNER)
        features &= offered
        self.tell(
            RequestType.SET_FEATURES, messages.U64.pack(features | messages.F_PROTOCOL_FEATURES)
        )
        return int(features)

    def set_memory(self, memory: Memory) -> None:
        """Give the device the memory, as one table."""
        table = messages.REGIONS.pack(len(memory.regions), 0)
        for region in memory.regions:
            table += messages.REGION.pack(*region)
        self.tell(RequestType.SET_MEM_TABLE, table, [memory.fd] * len(memory.regions))

    def set_ring(
        self, index: int, ring: Ring, base: int | None = None, enable: bool = True
    ) -> None:
        """Describe a ring, and have it started, at ``base`` or where the driver is."""
        state = messages.VRING_STATE
        self.tell(RequestType.SET_VRING_NUM, state.pack(index, ring.size))
        self.tell(
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
        self.tell(RequestType.SET_VRING_ADDR, address)
        number = messages.U64.pack(index)
        self.tell(RequestType.SET_VRING_ERR, number, [ring.error])
        self.tell(RequestType.SET_VRING_KICK, number, [ring.kick])
        self.tell(RequestType.SET_VRING_CALL, number, [ring.call])
        if enable:
            self.tell(RequestType.SET_VRING_ENABLE, state.pack(index, 1))

    def stop_ring(self, index: int) -> int:
        """Stop a ring; returns its base."""
        answer = self.ask(RequestType.GET_VRING_BASE, messages.VRING_STATE.pack(index, 0))
        return int(messages.VRING_STATE.unpack(answer)[1])

    def close(self) -> None:
        """Go away."""
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
