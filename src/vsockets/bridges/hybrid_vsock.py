"""The handshake of hybrid vsock: a guest's ports behind one unix socket of the host.

Firecracker's convention (its ``docs/vsock.md``), which Cloud Hypervisor and vhost-device-vsock
share: the host connects to the unix socket and says ``CONNECT`` and a port.  When the guest's
program has been reached, the device says ``OK`` and a number, and from then on it is a stream; when
not, it just closes.
"""

from __future__ import annotations

import errno
import os

#: ``OK`` and a 32-bit number are shorter, in bytes.
_LONGEST_ANSWER = 32


def connect_line(port: int) -> bytes:
    """What the host says."""
    return b"CONNECT %d\n" % port


class Answer:
    """The device's answer, to be read byte by byte: what follows the line is the stream's."""

    def __init__(self) -> None:
        self._line = b""

    def take(self, byte: bytes) -> bool:
        """Take the next byte, none at the end; whether the stream is there now.

        Raises OSError: ECONNRESET (nobody listens), EPROTO (that is no hybrid vsock).
        """
        if not byte:
            raise OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        self._line += byte
        if byte != b"\n" and len(self._line) < _LONGEST_ANSWER:
            return False
        word, _, number = self._line.removesuffix(b"\n").partition(b" ")
        if word != b"OK" or not number.isdigit() or byte != b"\n":
            raise OSError(
                errno.EPROTO, f"expected OK and a number from a hybrid vsock, got {self._line!r}"
            )
        return True
