"""The handshake of hybrid vsock: a guest's ports behind one unix socket of the host.

Firecracker's convention (its ``docs/vsock.md``), which Cloud Hypervisor and vhost-device-vsock
share.  The host connects to the unix socket and says ``CONNECT`` and a port.  When the guest's
program has been reached, the answer is ``OK`` and a number, and from then on it is a stream; when
not, the socket is just closed.  The other way there is no handshake: a guest that connects to a
port of the host comes to the unix socket whose name has ``_`` and the port at its end.

What follows a line is the stream's already, and may have come together with it.  So whoever reads
a line looks first (MSG_PEEK) and takes only what :meth:`Line.take` says, or takes single bytes.
"""

from __future__ import annotations

import errno
import os

from ..limits import HYBRID_LINE_MAX_BYTES
from ..model.address import LARGEST


def ok_line(port: int) -> bytes:
    """What it is answered: the number is a port for this connection at the host's side."""
    return b"OK %d\n" % port


def hyperkit_line(cid: int, port: int) -> bytes:
    """What HyperKit's socket ``connect`` is told, and answers only by what the guest says."""
    return b"%08x.%08x\n" % (cid, port)


def port_name(path: str, port: int) -> str:
    """Where a guest whose unix socket is ``path`` comes when it connects to the host's ``port``."""
    return f"{path}_{port}"


class Line:
    """One line of the handshake: a word and a number."""

    word: bytes

    def __init__(self) -> None:
        self._line = b""
        self.port: int | None = None  #: the number, once the line is there

    def take(self, data: bytes) -> int:
        """Take the next bytes; returns how many of them are the line's.

        Raises OSError: ECONNRESET when there are none, which is the stream's end; EPROTO when
        that is no such line.
        """
        if not data:
            raise OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        before = len(self._line)
        self._line += data[: HYBRID_LINE_MAX_BYTES - before]
        end = self._line.find(b"\n") + 1
        if end:
            self._line = self._line[:end]
            self._parse()
        elif len(self._line) == HYBRID_LINE_MAX_BYTES:
            self._fail()
        return len(self._line) - before

    def _parse(self) -> None:
        word, _, number = self._line[:-1].strip().partition(b" ")
        number = number.strip()
        if word.upper() != self.word or not number.isdigit() or int(number) > LARGEST:
            self._fail()
        self.port = int(number)

    def _fail(self) -> None:
        word = self.word.decode()
        raise OSError(
            errno.EPROTO, f"hybrid vsock: expected {word} and a number, got {self._line!r}"
        )


class Connect(Line):
    """What the host says, as the device reads it."""

    word = b"CONNECT"


class ClientHandshake(Line):
    """The host's side of a connection to a guest's port.

    The caller sends ``request``, then passes received bytes to :meth:`take` until ``port`` is set.
    ECONNRESET means that the guest's port has no listener.
    """

    word = b"OK"

    def __init__(self, port: int) -> None:
        super().__init__()
        self.request = b"CONNECT %d\n" % port
