"""A virtio device in a thread, and a host made of socket pairs."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.virtio_guest import FEATURES, SimulatedGuest
from vsockets.devices.loop import DeviceLoop
from vsockets.devices.vhost_user.session import VhostUserServer
from vsockets.devices.virtio.device import VirtioVsock
from vsockets.devices.virtio.ring import F_RING_PACKED

CID = 7


class Host:
    """A fabric whose connections are socket pairs, at the open ports."""

    def __init__(self) -> None:
        self.open_ports: set[int] = set()
        self.accepted: list[socket.socket] = []
        self.asked: list[tuple[int, int, tuple[int, int]]] = []
        self.given_up = 0
        self.hold = False
        self.held: list[Callable[[socket.socket | None], None]] = []
        self.refused: list[socket.socket] = []  #: sockets returned to vsockd

    def connect(
        self,
        kind: int,
        port: int,
        peer: tuple[int, int],
        done: Callable[[socket.socket | None], None],
    ) -> Callable[[], None]:
        self.asked.append((kind, port, peer))
        if self.hold:
            self.held.append(done)
        elif peer[1] in self.open_ports:
            ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
            theirs.settimeout(10)
            self.accepted.append(theirs)
            done(ours)
        else:
            done(None)
        return self._give_up

    def _give_up(self) -> None:
        self.given_up += 1

    def close(self) -> None:
        for sock in self.accepted + self.refused:
            sock.close()


class Rig:
    """The running device, and operations on it."""

    def __init__(self, folder: Path, features: int = 0) -> None:
        self.path = folder / "vhost"
        self.features = features  #: features that guests use beside a test's own
        self.host = Host()
        self.loop = DeviceLoop()
        self.device = VirtioVsock(self.loop, CID, self.host)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self.path))
        listener.listen()
        listener.setblocking(False)
        self.server = VhostUserServer(self.loop, listener, self.device)
        self._calls = socket.socketpair()
        self._pending: list[Callable[[], None]] = []
        self.loop.watch(self._calls[0].fileno(), self._called)
        self._guests: list[SimulatedGuest] = []
        self._thread = threading.Thread(target=self.loop.run)
        self._thread.start()

    def call(self, function: Callable[[], None]) -> None:
        """Run a function in the device's thread, and wait for it."""
        done = threading.Event()

        def work() -> None:
            try:
                function()
            finally:
                done.set()

        self._pending.append(work)
        self._calls[1].send(b"!")
        assert done.wait(10)

    def _called(self, events: int) -> None:
        self._calls[0].recv(1)
        self._pending.pop(0)()

    def guest(self, **options: object) -> SimulatedGuest:
        features = options.pop("features", FEATURES)
        assert isinstance(features, int)
        guest = SimulatedGuest(self.path, CID, features=features | self.features, **options)  # type: ignore[arg-type]
        self._guests.append(guest)
        return guest

    def connect_to_guest(
        self, port: int, kind: int = socket.SOCK_STREAM
    ) -> tuple[socket.socket, list[int]]:
        """Connect a program of the host to the guest; return its socket and the future outcome."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        theirs.settimeout(10)
        self.host.accepted.append(theirs)
        answers: list[int] = []

        def answer(error: int) -> None:
            if error:
                self.host.refused.append(ours.dup())
            answers.append(error)

        self.call(lambda: self.device.connect_to_guest(ours, (2, 9000 + port), port, answer))
        return theirs, answers

    def close(self) -> None:
        for guest in self._guests:
            guest.close()
        self.call(self.server.close)
        self.call(self.device.close)
        self.call(self.device.capture.close)
        self.call(self.loop.stop)
        self._thread.join(10)
        for sock in self._calls:
            sock.close()
        self.host.close()


@pytest.fixture(params=[0, F_RING_PACKED], ids=["split", "packed"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path, request.param)
    yield rig
    rig.close()
