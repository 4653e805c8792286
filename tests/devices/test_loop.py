"""A device's event loop: what is looked at without a pause."""

from __future__ import annotations

import socket

from vsockets.devices.loop import DeviceLoop


def test_a_look_is_repeated_between_events_until_it_is_over() -> None:
    loop = DeviceLoop()
    ours, theirs = socket.socketpair()
    heard: list[bytes] = []
    loop.watch(ours.fileno(), lambda events: heard.append(ours.recv(100)))
    looks = 0

    def look() -> bool:
        nonlocal looks
        looks += 1
        if looks == 5:
            theirs.send(b"x")
        if heard:
            loop.stop()
        return bool(heard)

    loop.spin(look, 60)
    loop.run()
    assert heard == [b"x"] and looks >= 6
    seen = looks
    loop.turn()
    assert looks == seen, "it was over"
    for sock in (ours, theirs, loop):
        sock.close()


def test_a_look_has_an_end() -> None:
    loop = DeviceLoop()
    loop.spin(lambda: False, 0)
    loop.call_later(0.001, loop.stop)
    loop.run()
    assert not loop._spinning
    loop.close()
