"""The device's event loop: polling, and slow closes."""

from __future__ import annotations

import socket
import subprocess
import sys

from vsockets.devices.loop import DeviceLoop


def test_spin_repeats_until_the_condition_holds() -> None:
    loop = DeviceLoop()
    ours, theirs = socket.socketpair()
    observed: list[bytes] = []
    loop.watch(ours.fileno(), lambda events: observed.append(ours.recv(100)))
    polls = 0

    def poll_once() -> bool:
        nonlocal polls
        polls += 1
        if polls == 5:
            theirs.send(b"x")
        if observed:
            loop.stop()
        return bool(observed)

    loop.spin(poll_once, 60)
    loop.run()
    assert observed == [b"x"] and polls >= 6
    seen = polls
    loop.turn()
    assert polls == seen, "it was over"
    for sock in (ours, theirs, loop):
        sock.close()


def test_spin_stops_after_its_time() -> None:
    loop = DeviceLoop()
    polls = []
    loop.spin(lambda: bool(polls.append(1)), 0)  # type: ignore[func-returns-value]
    loop.call_later(0.001, loop.stop)
    loop.run()
    before = len(polls)
    loop.turn()
    assert len(polls) == before > 0
    loop.close()


_SLOW_TO_CLOSE = """
import array, contextlib, socket, struct
from vsockets.devices.loop import DeviceLoop
from vsockets.devices.sandbox import enter_sandbox

server = socket.create_server(("127.0.0.1", 0))
slow = socket.create_connection(server.getsockname())
peer = server.accept()[0]
slow.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
slow.setblocking(False)
with contextlib.suppress(BlockingIOError):
    while True:
        slow.send(bytes(65536))
ours, theirs = socket.socketpair()
rights = array.array("i", [slow.fileno()])
ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
slow.close()
loop = DeviceLoop()

def ready(events):
    theirs.recv(1)  # the kernel closes what came with it
    loop.stop()

loop.watch(theirs.fileno(), ready)
enter_sandbox()
with loop.unhindered():
    loop.run()
peer.shutdown(socket.SHUT_RDWR)
print("served")
"""


def test_slow_close_of_a_passed_descriptor_is_interrupted() -> None:
    """The socket lingers for a minute; a sandbox allows no thread to close it."""
    command = [sys.executable, "-c", _SLOW_TO_CLOSE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert (done.stdout, done.stderr) == ("served\n", "")
