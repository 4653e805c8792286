"""State changes of a guest and their effect on streams, shared by the tests of both."""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

import vsockets
from vsockets import Attachment
from vsockets.control import Control
from vsockets.testing import PrivateFabric, wait_until

from .raw_client import PROMPT

#: CID of the changed guest; others must not be affected.
MACHINE = 5

#: The changes that end every connection of a guest.
DROPS = ["suspend", "migrate", "ft on", "power-off", "end of the lease"]
every_drop = pytest.mark.parametrize("how", DROPS)


@dataclass
class Machine:
    """A guest that exists by a lease, as one made by ``vsock run`` does."""

    fabric: PrivateFabric
    lease: Control
    context: Attachment

    def drop(self, how: str) -> dict[str, Any]:
        """Apply a change that ends the guest's connections."""
        control = self.fabric.control
        if how == "suspend":
            return control.suspend(MACHINE)
        if how == "migrate":
            return control.migrate(MACHINE)
        if how == "ft on":
            return control.fault_tolerance(MACHINE, True)
        if how == "power-off":
            return control.power_off(MACHINE)
        self.lease.close()
        wait_until(lambda: not self.context.folder.exists(), "the guest to be removed")
        return {"streams_left": []}

    def end_of(self, how: str) -> None:
        """Undo the change of :meth:`drop`."""
        control = self.fabric.control
        if how == "suspend":
            control.resume(MACHINE)
        elif how == "ft on":
            control.fault_tolerance(MACHINE, False)
        elif how == "power-off":
            control.power_on(MACHINE)
        elif how == "end of the lease":
            self.lease = Control(self.fabric.folder)
            self.lease.add_context(MACHINE, lease=True)


@contextlib.contextmanager
def machine(fabric: PrivateFabric) -> Iterator[Machine]:
    with Control(fabric.folder) as lease:
        folder = lease.add_context(MACHINE, lease=True)["folder"]
        found = Machine(fabric, lease, Attachment(folder))
        yield found
        found.lease.close()


@contextlib.contextmanager
def stream(
    listening: Attachment, connecting: Attachment, kind: int = socket.SOCK_STREAM
) -> Iterator[tuple[vsockets.socket, vsockets.socket]]:
    """Yield both ends of a stream as ``(accepted, connected)``."""
    with (
        vsockets.socket(type=kind, context=listening) as server,
        vsockets.socket(type=kind, context=connecting) as connected,
    ):
        server.bind((vsockets.VMADDR_CID_ANY, vsockets.VMADDR_PORT_ANY))
        server.listen()
        connected.connect(server.getsockname())
        accepted, _ = server.accept()
        server.close()
        with accepted:
            yield accepted, connected


def assert_ended(sock: socket.socket, queued: bytes = b"") -> None:
    """Check what a user of the guide sees: queued data, then the end or a reset, and EPIPE."""
    sock.settimeout(PROMPT)
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(65_536):
            received += data
    assert queued.startswith(received)
    with pytest.raises(BrokenPipeError):
        sock.send(b"x")


def assert_stands(one: socket.socket, other: socket.socket) -> None:
    one.sendall(b"there")
    assert other.recv(10) == b"there"
    other.sendall(b"and back")
    assert one.recv(10) == b"and back"


class Holder:
    """A process that has a descriptor and runs ``stream_holder.c``."""

    def __init__(self, command: list[str], fd: int) -> None:
        self.process = subprocess.Popen(
            [*command, str(fd)], stdout=subprocess.PIPE, pass_fds=[fd], bufsize=0
        )
        assert self.line() == "holds it"

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def line(self) -> str:
        """Return the next line it prints."""
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], 2 * PROMPT)
        assert readable, "the program says nothing"
        return self.process.stdout.readline().decode().strip()

    def assert_told(self) -> None:
        """Check that it has seen the end of its stream."""
        assert self.line() in ("read: end", "read: ECONNRESET")
        assert self.line() == "write: EPIPE"
