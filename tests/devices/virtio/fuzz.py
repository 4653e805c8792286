"""Seeded fuzzer of the device's queues, with a driver that writes anything.

    cd tests; python -m devices.virtio.fuzz --packets 1000000 --seed 7

It drives the device directly, without a thread or vhost-user.  No exception may escape except those
that the device turns into a disabled ring; the host's sockets continue to work; memory and
descriptors do not grow.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import socket
import sys
from collections.abc import Callable

from support.packed_driver import PackedDriverRing
from support.virtio_driver import GUEST_BASE, DriverRing, Memory
from vsockets.devices.loop import DeviceLoop
from vsockets.devices.vhost_user import Vring
from vsockets.devices.virtio.device import RECEIVE, TRANSMIT, VirtioVsock
from vsockets.devices.virtio.packet import HEADER_SIZE, Header, Op
from vsockets.devices.virtio.ring import F_RING_EVENT_IDX, F_RING_INDIRECT_DESC, F_RING_PACKED

CID = 3
SIZE = 64
_PORTS = (5000, 5001, 5002)
_ODD_NUMBERS = (0, 1, 43, 44, 45, 4096, 65_536, 1 << 31, 0xFFFF_FFFF)


class _Host:
    """A fabric that accepts at some ports, and acts at random on its sockets."""

    def __init__(self, random_: random.Random) -> None:
        self._random = random_
        self.sockets: list[socket.socket] = []

    def connect(
        self,
        kind: int,
        port: int,
        peer: tuple[int, int],
        done: Callable[[socket.socket | None], None],
    ) -> Callable[[], None]:
        if peer[1] == _PORTS[0] or self._random.random() < 0.3:
            done(None)
        else:
            ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
            ours.setblocking(False)
            theirs.setblocking(False)
            self.sockets.append(theirs)
            done(ours)
        return lambda: None

    def act(self) -> None:
        if not self.sockets:
            return
        sock = self._random.choice(self.sockets)
        try:
            match self._random.randrange(5):
                case 0:
                    sock.send(bytes(self._random.randrange(1, 20_000)))
                case 1:
                    sock.shutdown(self._random.choice((socket.SHUT_RD, socket.SHUT_WR)))
                case 2:
                    self.sockets.remove(sock)
                    sock.close()
                case _:
                    sock.recv(1 << 18)
        except OSError:
            pass
        if len(self.sockets) > 50:
            self.sockets.pop(0).close()


class Session:
    """One guest, from its start until it breaks a ring or has sent enough."""

    def __init__(self, seed: int, packets: int) -> None:
        self.random = random.Random(seed)
        self.left = packets
        self.memory = Memory(1 << 20, self.random.choice((1, 2, 4)))
        self.loop = DeviceLoop()
        self.host = _Host(self.random)
        self.device = VirtioVsock(self.loop, CID, self.host)
        event_index = self.random.random() < 0.7
        kind = self.random.choice((DriverRing, PackedDriverRing))
        features = F_RING_INDIRECT_DESC | (F_RING_EVENT_IDX if event_index else 0)
        self.device.set_features(features | (F_RING_PACKED if kind is PackedDriverRing else 0))
        for address, size, _, offset in self.memory.regions:
            self.device.memory.map(address, size, True, self.memory.fd, offset)
        self.rings = [
            kind(self.memory, SIZE, event_index, self.random.random() < 0.5) for _ in range(2)
        ]
        self.vrings = []
        for index, ring in enumerate(self.rings):
            vring = Vring()
            vring.size, vring.base = SIZE, ring.base
            vring.take("kick", os.dup(ring.kick))
            vring.take("call", os.dup(ring.call))
            parts = (ring.descriptors, ring.available, ring.used)
            a, b, c = (GUEST_BASE + part for part in parts)
            self.device.start_ring(index, vring, (a, b, c))
            self.vrings.append(vring)
        self.place = self.memory.allocate(1 << 18)
        self.known: list[Header] = []

    @property
    def is_broken(self) -> bool:
        return len(self.device._vrings) < 2

    def run(self) -> int:
        """Run; return the number of packets that the device received."""
        before = self.left
        try:
            while self.left > 0 and not self.is_broken:
                self.turn()
        finally:
            self.close()
        return before - self.left

    def turn(self) -> None:
        receive = self.rings[RECEIVE]
        for ring in self.rings:
            try:
                ring.collect()
            except KeyError:  # an error of this driver after it wrote nonsense
                self.left = 0
                return
        for _ in range(self.random.randrange(1, 20)):
            self.packet()
        while receive.has_room(2) and self.random.random() < 0.9:
            size = self.random.choice((44, 45, 100, 4140, 4140, 4140))
            receive.add([(self.place, size)], writable=True)
        if self.random.random() < 0.002:
            self.break_something()
        for ring in self.rings:
            ring.publish()
        for _ in range(3):
            self.host.act()
        self.device.poll()
        self.loop.turn()
        for connection in list(self.device.connections.values()):
            if connection.sock is not None and self.random.random() < 0.3:
                self.device._on_ready(connection, self.random.choice((1, 4, 5, 0x2001, 0x2015)))

    def packet(self) -> None:
        """Send one packet, valid or not."""
        ring, random_ = self.rings[TRANSMIT], self.random
        if not ring.has_room(3):
            return
        self.left -= 1
        length = random_.choice((0, 1, 10, 1000, 65_536))
        header = Header(
            CID if random_.random() < 0.97 else random_.randrange(1 << 64),
            2 if random_.random() < 0.97 else random_.randrange(1 << 64),
            random_.randrange(1024, 1064),
            random_.choice(_PORTS),
            length if random_.random() < 0.97 else random_.choice(_ODD_NUMBERS),
            random_.choice((1, 1, 1, 1, 1, 1, 1, 2, 2, random_.randrange(65_536))),
            random_.choice((Op.REQUEST, Op.RW, Op.RW, Op.RW, random_.randrange(9))),
            random_.choice((0, 0, 1, 2, 3, random_.randrange(1 << 32))),
            random_.choice((1 << 18, 1 << 18, random_.choice(_ODD_NUMBERS))),
            random_.choice((0, 0, random_.choice(_ODD_NUMBERS))),
        )
        if self.known and random_.random() < 0.7:  # continue with a connection
            known = random_.choice(self.known)
            header = known._replace(
                op=header.op, length=header.length, flags=header.flags, fwd_cnt=header.fwd_cnt
            )
        else:
            self.known = [*self.known[-20:], header]
        at = self.place + random_.randrange(0, 1 << 17)
        self.memory.view[at : at + HEADER_SIZE] = header.encode()
        cut = random_.choice((HEADER_SIZE, HEADER_SIZE, 10))
        parts = [(at, cut), (at + cut, HEADER_SIZE + length - cut)]
        ring.add([part for part in parts if part[1]], writable=False)

    def break_something(self) -> None:
        ring, random_ = self.random.choice(self.rings), self.random
        match random_.randrange(4):
            case 0 if isinstance(ring, DriverRing):
                ring.make_available(random_.randrange(1 << 16))
            case 1 if isinstance(ring, DriverRing):
                ring.next = ring.next + random_.randrange(200) & 0xFFFF
            case 2:
                place = random_.randrange(0, ring.used + 500)
                self.memory.view[place] = random_.randrange(256)
            case _:
                ring.write_descriptor(
                    random_.randrange(SIZE),
                    random_.choice((GUEST_BASE, 0, random_.randrange(1 << 64))),
                    random_.choice(_ODD_NUMBERS),
                    random_.randrange(8) | random_.choice((0, 1 << 7, 1 << 15)),
                    random_.randrange(1 << 16),
                )

    def close(self) -> None:
        for index in (RECEIVE, TRANSMIT):
            self.device.stop_ring(index)
        self.device.reset()
        self.device.close()
        self.device.memory.clear()
        for vring in self.vrings:
            vring.close()
        for ring in self.rings:
            ring.close()
        for sock in self.host.sockets:
            sock.close()
        self.loop.close()
        self.memory.close()


def fuzz(seed: int, packets: int, a_session: int = 3000) -> int:
    """Run sessions until the device received ``packets``; return the number of sessions."""
    sessions = 0
    while packets > 0:
        packets -= max(1, Session(seed * 1_000_003 + sessions, min(packets, a_session)).run())
        sessions += 1
    return sessions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--packets", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    step = arguments.packets // 10
    for number in range(10):
        sessions = fuzz(arguments.seed + number, step)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        descriptors = len(os.listdir("/proc/self/fd"))
        print(f"{step} packets, {sessions} sessions, {peak} MiB, {descriptors} descriptors")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
