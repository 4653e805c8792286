"""Simulation of Firecracker's side of hybrid vsock: its unix socket, and its guest.

Firecracker itself needs /dev/kvm.  ``tests/vm/test_hybrid.py`` has a real peer, Debian's
vhost-device-vsock with a guest.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from vsockets.protocol.hybrid import port_name
from vsockets.testing import PrivateFabric, wait_until

PATIENCE = 20.0


def read_line(sock: socket.socket) -> bytes:
    """Read a line and no byte beyond it."""
    line = b""
    while not line.endswith(b"\n"):
        byte = sock.recv(1)
        assert byte, f"ended after {line!r}"
        line += byte
    return line


def read_all(sock: socket.socket) -> bytes:
    data = bytearray()
    while piece := sock.recv(1 << 16):
        data += piece
    return bytes(data)


class SimulatedFirecracker:
    """A monitor at ``path``, and its guest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._name = os.path.basename(path)
        self._folder = os.open(path.parent, os.O_PATH)  # the path may be long
        self.listener: socket.socket | None = None

    def _near(self, name: str) -> str:
        return f"/proc/self/fd/{self._folder}/{name}"

    def power_on(self) -> None:
        """Create the socket."""
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self._near(self._name))
        self.listener.listen(128)
        self.listener.settimeout(PATIENCE)

    def power_off(self) -> None:
        if self.listener is not None:
            self.listener.close()
            self.listener = None
            self.path.unlink()

    def close(self) -> None:
        self.power_off()
        os.close(self._folder)

    def asked(self) -> tuple[socket.socket, bytes]:
        """Accept the host's next connection; return it and its request line."""
        assert self.listener is not None
        sock, _ = self.listener.accept()
        sock.settimeout(PATIENCE)
        return sock, read_line(sock)

    def accepts(self, port: int, more: bytes = b"") -> socket.socket:
        """Accept the host's connect to ``port`` as a program of the guest, and send ``more``."""
        sock, line = self.asked()
        assert line == b"CONNECT %d\n" % port
        sock.sendall(b"OK 1073741824\n" + more)
        return sock

    def connects(self, port: int) -> socket.socket:
        """Connect to the host's ``port`` as a program of the guest.

        Raises ConnectionRefusedError.
        """
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE)
        try:
            sock.connect(self._near(port_name(self._name, port)))
        except FileNotFoundError:
            sock.close()
            raise ConnectionRefusedError from None  # Firecracker sends its guest a reset
        except BaseException:
            sock.close()
            raise
        return sock

    def ports(self) -> set[int]:
        """Return the host's ports that the guest can connect to."""
        start = self._name + "_"
        return {
            int(name.removeprefix(start))
            for name in os.listdir(self.path.parent)
            if name.startswith(start) and name != f"{start}new"
        }

    def wait_for(self, *ports: int) -> None:
        """Wait until the guest can connect to these ports."""
        wait_until(lambda: self.ports() == set(ports), f"ports {ports}", PATIENCE)


class HybridDevice:
    """A process of ``vsock device hybrid``."""

    def __init__(
        self, fabric: PrivateFabric, path: Path, *options: str, cid: int | None = None
    ) -> None:
        command = [sys.executable, "-m", "vsockets.cli", "--dir", str(fabric.folder)]
        command += ["device", "hybrid", "--socket", str(path), "--verbose", *options]
        if cid is not None:
            command += ["--cid", str(cid)]
        self._log = path.parent / "device.log"
        with open(self._log, "w") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.strip().isdecimal(), self.log
        self.cid = int(line)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(how)
        status = self.process.wait(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status

    def __enter__(self) -> HybridDevice:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()
