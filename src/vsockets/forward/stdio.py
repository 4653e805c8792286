"""Our own standard input and output as one stream socket.

They may be files and terminals, which epoll will not have or which must not be made non-blocking,
as others share them.  So two threads copy between them and a socket.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading

_CHUNK = 65_536


def standard_streams() -> socket.socket:
    """A non-blocking socket joined to standard input and output."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    # A read from a terminal cannot be called off, so that thread must not hold up the end; but
    # the end comes after all has been written.
    threading.Thread(target=_copy_input, args=(theirs,), daemon=True).start()
    threading.Thread(target=_copy_output, args=(theirs,)).start()
    return ours


def _copy_input(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the stream takes no more, or there is no input
        while data := os.read(0, _CHUNK):
            sock.sendall(data)
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)


def _copy_output(sock: socket.socket) -> None:
    try:
        while data := sock.recv(_CHUNK):
            view = memoryview(data)
            while view:
                view = view[os.write(1, view) :]
    except OSError:  # nobody reads any more
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RD)
