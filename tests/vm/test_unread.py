"""Messages that a program in a stock guest has not read, over the virtio device.

Since 6.12.92, Linux resets a connection with too many unread packets, even if they are small.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
import threading
import time

import pytest

import vsockets
from vsockets import AF_VSOCK

from .conftest import Machines
from .exchanges import PATIENCE
from .machine import Machine

pytestmark = pytest.mark.timeout(300)

CREDIT = 262_144
SIZES = [1, 8, 100, 129, 200, 400, 1000, 4096, 65_536]
KINDS = [socket.SOCK_STREAM, socket.SOCK_SEQPACKET]

#: More messages than Linux accepts unread (455), and the timeout in seconds for each to become a
#: packet.
MESSAGES = 500
_OWN_PACKET = 1.0


@pytest.fixture(scope="module", params=["stable", "backports", "newest"])
def machine(request: pytest.FixtureRequest, machines: Machines) -> Machine:
    """A running guest for each kernel."""
    return machines.get(request.param, "virtio")


class Sender:
    """A sender of messages, each in its own packet as long as packets are accepted."""

    def __init__(self, machine: Machine, kind: int, port: int, size: int, count: int) -> None:
        self._sock = vsockets.socket(AF_VSOCK, kind, context=machine.host)
        self._sock.settimeout(PATIENCE)
        self._sock.connect((machine.cid, port))
        self._message = bytes(size)
        self._count = count
        self.stalled = threading.Event()  #: all messages are sent, or none is accepted now
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            for _ in range(self._count):
                self._sock.send(self._message)
                deadline = time.monotonic() + _OWN_PACKET
                while not self.stalled.is_set() and self._queued():
                    if time.monotonic() > deadline:
                        self.stalled.set()
            self._sock.shutdown(socket.SHUT_WR)
        finally:
            self.stalled.set()

    def _queued(self) -> int:
        answer = fcntl.ioctl(self._sock.fileno(), termios.TIOCOUTQ, bytes(4))
        return int(struct.unpack("i", answer)[0])

    def close(self) -> None:
        self._thread.join()
        self._sock.close()


@pytest.mark.parametrize("kind", KINDS)
def test_unread_messages_of_all_sizes(machine: Machine, kind: int) -> None:
    machine.run(
        "import sys; l = sys.unread = socket.socket(AF, kind); l.bind((ANY, 6030)); l.listen()",
        kind=int(kind),
    )
    for size in SIZES:
        count = min(CREDIT // size, MESSAGES)
        accepted = machine.start("import sys; sys.taken, _ = sys.unread.accept()\nresult = True")
        sender = Sender(machine, kind, 6030, size, count)
        try:
            assert accepted.result()
            assert sender.stalled.wait(PATIENCE)
            found = machine.run(
                """
                import sys
                n = total = 0
                while d := sys.taken.recv(1 << 17): total += len(d); n += 1
                sys.taken.close()
                result = total, n
                """
            )
        finally:
            sender.close()
        assert found[0] == size * count, size
        if kind == socket.SOCK_SEQPACKET:
            assert found[1] == count
    machine.run("import sys; sys.unread.close()")
