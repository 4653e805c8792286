"""The kernel's own timeouts, which cost nothing while nothing is late.

Python's would be a poll() before every call, and so a part of what is measured.
"""

from __future__ import annotations

import socket
import struct

from .limits import PERF_SILENCE_SECONDS


def set_timeouts(
    sock: socket.socket, receive: float = PERF_SILENCE_SECONDS, send: float = PERF_SILENCE_SECONDS
) -> None:
    """Make ``sock`` blocking; calls that take longer raise BlockingIOError.  In seconds."""
    sock.settimeout(None)
    for option, seconds in ((socket.SO_RCVTIMEO, receive), (socket.SO_SNDTIMEO, send)):
        timeval = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, option, timeval)
