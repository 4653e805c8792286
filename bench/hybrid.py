"""Hybrid vsock beside socat: a stream of the host's to a guest, whose monitor is played here.

What the device has to do is what socat does between two unix sockets.  A stream from the guest it
hands over, so that one is measured beside a unix socket pair.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import vsockets
from vsockets.testing import PrivateFabric, wait_until

from .streams import Pair

_PATIENCE = 20.0
_PORT = 52


class Stage:
    """A monitor that answers one connect after the other, and the device that leads there."""

    def __init__(self, fabric: PrivateFabric, folder: Path) -> None:
        self._fabric = fabric
        self._path = folder / "v.sock"
        self._monitor = socket.socket(socket.AF_UNIX)
        self._monitor.bind(str(self._path))
        self._monitor.listen()
        command = [sys.executable, "-m", "vsockets.cli", "--dir", str(fabric.folder)]
        command += ["device", "hybrid", "--socket", str(self._path)]
        self._device = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._device.stdout is not None
        self._cid = int(self._device.stdout.readline())

    @contextlib.contextmanager
    def to_guest(self) -> Iterator[Pair]:
        """A program of the host has connected to the guest: its end, and the monitor's."""
        accepted: list[socket.socket] = []

        def accept() -> None:
            sock, _ = self._monitor.accept()
            sock.recv(32)
            sock.sendall(b"OK 1024\n")
            accepted.append(sock)

        thread = threading.Thread(target=accept)
        thread.start()
        one = vsockets.create_connection((self._cid, _PORT), context=self._fabric.host)
        thread.join()
        with one, accepted[0]:
            yield one, accepted[0]

    @contextlib.contextmanager
    def from_guest(self) -> Iterator[Pair]:
        """The guest has connected to a program of the host: the monitor's end, and that one's."""
        with vsockets.create_server((2, _PORT), context=self._fabric.host) as server:
            path = Path(f"{self._path}_{_PORT}")
            wait_until(path.exists, "the port", _PATIENCE)
            one = socket.socket(socket.AF_UNIX)
            one.connect(str(path))
            other, _ = server.accept()
            with one, other:
                yield one, other

    def close(self) -> None:
        """End the device."""
        self._device.terminate()
        self._device.wait()
        assert self._device.stdout is not None
        self._device.stdout.close()
        self._monitor.close()


@contextlib.contextmanager
def running() -> Iterator[Stage]:
    """The device, with a fabric of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="vsock-", dir="/tmp") as folder,
        PrivateFabric(log_level="warning") as fabric,
    ):
        stage = Stage(fabric, Path(folder))
        try:
            yield stage
        finally:
            stage.close()
