"""``vsock forward`` and socat between two unix sockets, in the same run.

Both sides are unix sockets, because socat has no access to the fabric; a vSockets stream is a unix
socket, too.
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

#: Block sizes of socat in bytes: its default, and a faster one.
SOCAT_BLOCKS = {"socat": 8192, "socat 64K": 65536}


def available() -> bool:
    """Return whether socat is installed."""
    return shutil.which("socat") is not None


class Forwarders:
    """The forwarders that are compared, all with the same target."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(folder / "server"))
        self.server.listen(4096)

    def command(self, name: str) -> list[str]:
        """Return the command of the forwarder ``name``."""
        target, source = self.folder / "server", self.folder / name
        if name in SOCAT_BLOCKS:
            block = f"-b{SOCAT_BLOCKS[name]}"
            return [
                "socat",
                block,
                f"UNIX-LISTEN:{source},fork,backlog=4096",
                f"UNIX-CONNECT:{target}",
            ]
        return [sys.executable, "-m", "vsockets.cli", "forward", f"unix:{source}", f"unix:{target}"]

    @contextlib.contextmanager
    def pair(self, name: str) -> Iterator[Pair]:
        """Yield the two ends of a connection: the client's and the server's."""
        one = socket.socket(socket.AF_UNIX)
        one.connect(str(self.folder / name))
        other, _ = self.server.accept()
        with one, other:
            yield one, other

    def connects(self, name: str, count: int, clients: int) -> float:
        """Return the connects per second, each with a byte sent and echoed."""
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
    """Yield the running forwarders and their names, vsock forward first."""
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
