"""Hybrid vsock and socat: streams from the host to a guest with a simulated monitor.

In this direction the device does the same as socat between two unix sockets.  It hands a stream
from the guest off, so that direction is compared with a unix socketpair.
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
    """A monitor that answers connects in sequence, and its hybrid device."""

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
        """Yield the two ends of a stream from the host: the program's and the monitor's."""
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
        """Yield the two ends of a stream from the guest: the monitor's and the program's."""
        with vsockets.create_server((2, _PORT), context=self._fabric.host) as server:
            path = Path(f"{self._path}_{_PORT}")
            wait_until(path.exists, "the port", _PATIENCE)
            one = socket.socket(socket.AF_UNIX)
            one.connect(str(path))
            other, _ = server.accept()
            with one, other:
                yield one, other

    def close(self) -> None:
        """Stop the device and the monitor."""
        self._device.terminate()
        self._device.wait()
        assert self._device.stdout is not None
        self._device.stdout.close()
        self._monitor.close()


@contextlib.contextmanager
def running() -> Iterator[Stage]:
    """Yield a running device in a private fabric."""
    with (
        tempfile.TemporaryDirectory(prefix="vsock-", dir="/tmp") as folder,
        PrivateFabric(log_level="warning") as fabric,
    ):
        stage = Stage(fabric, Path(folder))
        try:
            yield stage
        finally:
            stage.close()
