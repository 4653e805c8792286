"""The handshake of hybrid vsock: a guest's ports behind one unix socket of the host.

The convention of Firecracker (its page on vsock), Cloud Hypervisor and vhost-device-vsock.  The
host connects to the unix socket and sends ``CONNECT`` and a port.  If the guest's program accepts,
the reply is ``OK`` and a number, and the connection is then a stream; otherwise the device closes
the socket.  In the other direction there is no handshake: the device connects to the unix socket
whose name ends with ``_`` and the host's port.

The data of the stream follows the line at once, and may be received together with it.  So a reader
peeks first (MSG_PEEK) and takes only as many bytes as :meth:`Line.take` returns, or reads single
bytes.
"""

from __future__ import annotations

import errno
import os

from ..limits import HYBRID_LINE_MAX_BYTES
from ..model.address import LARGEST


def ok_line(port: int) -> bytes:
    """Return the device's reply to CONNECT; ``port`` is the port of the host's end."""
    return b"OK %d\n" % port


def hyperkit_line(cid: int, port: int) -> bytes:
    """Return the line that requests ``(cid, port)`` from HyperKit's socket; it has no reply."""
    return b"%08x.%08x\n" % (cid, port)


def port_name(path: str, port: int) -> str:
    """Return the path of the unix socket that stands for the host's ``port``.

    ``path`` is the guest's unix socket.
    """
    return f"{path}_{port}"


class Line:
    """One line of the handshake: a word and a number."""

    word: bytes

    def __init__(self) -> None:
        self.received = b""  #: the bytes of the line so far
        self.port: int | None = None  #: the number, once the line is complete

    def take(self, data: bytes) -> int:
        """Parse the next bytes; return how many of them belong to the line.

        Raises OSError: ECONNRESET if ``data`` is empty, which is the end of the stream; EPROTO if
        the line is invalid.
        """
        if not data:
            raise OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        before = len(self.received)
        self.received += data[: HYBRID_LINE_MAX_BYTES - before]
        end = self.received.find(b"\n") + 1
        if end:
            self.received = self.received[:end]
            self._parse()
        elif len(self.received) == HYBRID_LINE_MAX_BYTES:
            self._fail()
        return len(self.received) - before

    def _parse(self) -> None:
        word, _, number = self.received[:-1].strip().partition(b" ")
        number = number.strip()
        if word.upper() != self.word or not number.isdigit() or int(number) > LARGEST:
            self._fail()
        self.port = int(number)

    def _fail(self) -> None:
        word = self.word.decode()
        raise OSError(
            errno.EPROTO,
            f"hybrid vsock: invalid line {self.received!r} (expected {word} and a number)",
        )


class Connect(Line):
    """The parser of the host's request, ``CONNECT PORT``, used by the device."""

    word = b"CONNECT"


class ClientHandshake(Line):
    """The host's request to connect to a guest's port, and the parser of the device's reply.

    The caller sends ``request``, then passes received bytes to :meth:`take` until ``port`` is set.
    ECONNRESET means that the guest's port has no listener.
    """

    word = b"OK"

    def __init__(self, port: int) -> None:
        super().__init__()
        self.request = b"CONNECT %d\n" % port
