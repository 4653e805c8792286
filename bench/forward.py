"""``vsock forward`` beside socat: from one unix socket to another, in the same run.

Unix sockets on both sides, because socat cannot speak to the fabric; a vSockets stream is one.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vsockets.testing import wait_until

from .harness import child, run_children
from .streams import Pair

#: Bytes socat reads and writes at a time: what it does by default, and what suits it better.
SOCAT_BLOCKS = {"socat": 8192, "socat 64K": 65536}


def available() -> bool:
    """Whether there is a socat to compare with."""
    return shutil.which("socat") is not None


class Forwarders:
    """One of each kind, all to the same listening socket."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(folder / "server"))
        self.server.listen(4096)

    def command(self, name: str) -> list[str]:
        """How to start it."""
        to, come = self.folder / "server", self.folder / name
        if name in SOCAT_BLOCKS:
            block = f"-b{SOCAT_BLOCKS[name]}"
            return ["socat", block, f"UNIX-LISTEN:{come},fork,backlog=4096", f"UNIX-CONNECT:{to}"]
        return [sys.executable, "-m", "vsockets.cli", "forward", f"unix:{come}", f"unix:{to}"]

    @contextlib.contextmanager
    def pair(self, name: str) -> Iterator[Pair]:
        """A connection through it: our end, and the one at the server."""
        one = socket.socket(socket.AF_UNIX)
        one.connect(str(self.folder / name))
        other, _ = self.server.accept()
        with one, other:
            yield one, other

    def connects(self, name: str, count: int, clients: int) -> float:
        """Connects a second that were served: a byte there, and back."""
        path = str(self.folder / name)

        def serve() -> None:
            while True:
                sock, _ = self.server.accept()
                with sock:
                    sock.send(sock.recv(1))

        def client() -> None:
            for _ in range(count):
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(path)
                    sock.send(b"x")
                    sock.recv(1)

        with child(serve):
            return count * clients / run_children([client] * clients)


@contextlib.contextmanager
def running() -> Iterator[tuple[Forwarders, list[str]]]:
    """All of them, and their names, ours first."""
    names = ["forward", *SOCAT_BLOCKS]
    with tempfile.TemporaryDirectory(prefix="vsock-", dir="/tmp") as folder:
        forwarders = Forwarders(Path(folder))
        with forwarders.server, contextlib.ExitStack() as stack:
            for name in names:
                process = subprocess.Popen(forwarders.command(name))
                stack.callback(_end, process)
                path = forwarders.folder / name
                wait_until(path.exists, name, 20)
            yield forwarders, names


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait()
