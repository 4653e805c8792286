"""Fuzzer of the VMCI device: random registers, hypercalls, control packets and queue indices.

Each case is one move, derived from a driver's by changing a part of it.  For a long run: ``cd
tests; python -m devices.vmci.fuzz 1000000``.
"""

from __future__ import annotations

import contextlib
import random
import struct
import sys
from collections.abc import Callable

from support.vmci_driver import CID, MEMORY, PAGE, SimulatedGuest
from vsockets.devices.vfio_user import Region
from vsockets.devices.vmci.packets import LARGEST, Handle, Hypercall, Packet

#: Numbers at boundaries.
EDGES = [
    0,
    1,
    2,
    3,
    16,
    127,
    128,
    4095,
    4096,
    4097,
    65_536,
    LARGEST,
    MEMORY - 1,
    MEMORY,
    2**31,
    2**32 - 1,
]
WIDE = [*EDGES, 2**32, 2**63, 2**64 - 4096, 2**64 - 1]


class Fuzzer:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.guest = SimulatedGuest()
        self.guest.probe()
        self.moves: list[Callable[[], object]] = [
            self.register,
            self.hypercall,
            self.queue_pair,
            self.queue_pair,
            self.packet,
            self.packet,
            self.packet,
            self.raw,
            self.indices,
            self.indices,
            self.program,
            self.receive,
            self.stream,
        ]

    def number(self, edges: list[int]) -> int:
        rng = self.rng
        if rng.random() < 0.6:
            return rng.choice(edges)
        return rng.randrange(rng.choice([8, 70, 5000, MEMORY, edges[-1] + 1]))

    def small(self) -> int:
        return self.rng.choice([CID, 2, 0, 1, 5000, 1234, 80, self.number(EDGES)])

    def run(self, cases: int) -> None:
        for number in range(cases):
            self.rng.choice(self.moves)()
            if number % 16 == 0:
                self.guest.loop.turn()
            if number % 4096 == 0:
                self.restart()

    def restart(self) -> None:
        self.guest.device.reset()
        self.guest.fabric.close()
        self.guest.loop.turn()
        self.guest.probe()

    # Moves

    def register(self) -> None:
        guest, rng = self.guest, self.rng
        if rng.random() < 0.3:
            offset = rng.randrange(0, 0x40000 - 8)
            guest.device.write(Region.BAR1, offset, rng.randbytes(rng.choice([1, 2, 4, 8])))
            guest.device.read(Region.BAR1, offset, rng.choice([1, 2, 4, 8]))
        else:
            guest.store(rng.randrange(0, 0x38, 4), self.number(EDGES))
            guest.load(rng.randrange(0, 0x38, 4))
            guest.store(0x24 + 4, 0)
            guest.store(0x2C + 4, 0)

    def hypercall(self) -> None:
        payload = struct.pack("<IIQ", self.small(), self.small(), self.number(WIDE))
        payload = payload[: self.rng.choice([0, 4, 7, 8, 15, 16])]
        self.guest.call(self.rng.choice([*Hypercall, self.small()]), payload)

    def queue_pair(self) -> None:
        rng, guest = self.rng, self.guest
        size = rng.choice([128, 4096, 5000, self.number(WIDE)])
        other = size if rng.random() < 0.9 else self.number(WIDE)
        count = min(-(-size // PAGE) + -(-other // PAGE) + 2, 40)
        first = rng.randrange(64, 1900)
        pages = [first + n for n in range(count)]
        if rng.random() < 0.1 and pages:
            pages[rng.randrange(len(pages))] = self.number(WIDE)
        handle = Handle(
            self.small() & 0xFFFF_FFFF, rng.choice([rng.randrange(50), self.small()]) & 0xFFFF_FFFF
        )
        said = count if rng.random() < 0.95 else self.number(WIDE)
        payload = struct.pack(
            "<IIIIQQQ", *handle, 2, rng.choice([0, 0, 1, self.number(EDGES)]), size, other, said
        )
        guest.call(Hypercall.QUEUEPAIR_ALLOC, payload + struct.pack(f"<{len(pages)}Q", *pages))
        if rng.random() < 0.3:
            guest.detach(handle)

    def packet(self) -> None:
        rng = self.rng
        value = rng.choice([4096, 65_536, self.number(WIDE), CID | rng.randrange(50) << 32])
        packet = Packet(
            rng.choice([*range(13), 13, 255]),
            rng.choice([80, 1234, rng.randrange(20)]),
            rng.choice([5000, 5000, self.small()]),
            value,
            self.number(WIDE),
            rng.choice([0, 1, 1, 65_535]),
        )
        self.guest.packet(packet, rng.choice([2, 2, 0, self.small()]))

    def raw(self) -> None:
        rng = self.rng
        data = rng.randbytes(rng.choice([0, 23, 24, 56, 4096]))
        size = rng.choice([len(data), self.number(EDGES)])
        self.guest.send_raw(data, size, rng.choice([0, self.number(EDGES)]))

    def indices(self) -> None:
        page = self.rng.randrange(64, 1990) * PAGE
        self.guest.memory[page + 8 : page + 24].cast("Q")[self.rng.randrange(2)] = self.number(WIDE)

    def stream(self) -> None:
        """Make a valid connection, then write invalid indices."""
        rng, guest = self.rng, self.guest
        guest.receive()
        try:
            stream = guest.connect(rng.randrange(10_000, 60_000), rng.choice([128, 4096, 5000]))
        except (AssertionError, ValueError):
            return  # an earlier move prevents it
        for _ in range(rng.randrange(4)):
            stream.set_indices(self.number(WIDE), self.number(WIDE))
            stream.tell(rng.choice([5, 6, 8, 9, 10]), rng.randrange(4))
            guest.loop.turn()
        if rng.random() < 0.5:
            guest.detach(stream.handle)

    def program(self) -> None:
        """Act as programs of the host."""
        streams = self.guest.fabric.streams
        if streams:
            stream = self.rng.choice(streams)
            with contextlib.suppress(OSError):
                if self.rng.random() < 0.5:
                    stream.send(bytes(self.rng.randrange(10_000)))
                else:
                    stream.recv(10_000)
            if self.rng.random() < 0.2 or len(streams) > 50:
                streams.remove(stream)
                stream.close()

    def receive(self) -> None:
        self.guest.store(0x2C, self.number(EDGES))
        self.guest.receive()


if __name__ == "__main__":
    cases, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    Fuzzer(seed).run(cases)
    print(f"{cases} cases of seed {seed}")
