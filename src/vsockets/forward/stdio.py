"""The process's standard input and output as one stream socket.

They may be files, which epoll rejects, or terminals, which must stay blocking because other
processes share them.  Two threads therefore copy between them and a socket.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading

_CHUNK = 65_536


def standard_streams() -> socket.socket:
    """Return a non-blocking socket that is joined to standard input and output."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    # A daemon thread, because a read from a terminal cannot be cancelled when the program ends.
    threading.Thread(target=_copy_input, args=(theirs,), daemon=True).start()
    # Not a daemon thread: the program ends after all output is written.
    threading.Thread(target=_copy_output, args=(theirs,)).start()
    return ours


def _copy_input(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the stream is closed, or standard input is
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
    except OSError:  # the reader of standard output has closed it
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RD)
