"""A guest's serial console on our terminal, or on whatever standard input and output are."""

from __future__ import annotations

import contextlib
import os
import socket
import termios
import threading
from collections.abc import Callable, Iterator

STDIN, STDOUT = 0, 1

#: Ctrl-], as in telnet and virsh: for us, not for the guest.
ESCAPE = b"\x1d"

#: How long what the guest said last may take to be shown, in seconds.
_FAREWELL = 5.0


@contextlib.contextmanager
def console(sock: socket.socket, escape: Callable[[], object]) -> Iterator[Callable[[], None]]:
    """Show what comes from ``sock`` and send it what is typed, while the context lasts.

    On a terminal all keys are the guest's but Ctrl-], at which ``escape`` is called, in a
    thread.  Afterwards the terminal is as it was, and all that came was shown.  What the
    context gives waits for the end of what comes.
    """
    terminal = os.isatty(STDIN)
    # Threads: a terminal that is stopped holds up nothing but the console.
    shows = threading.Thread(target=_show, args=(sock,), daemon=True)
    types = threading.Thread(target=_type, args=(sock, escape if terminal else None), daemon=True)
    with _raw() if terminal else contextlib.nullcontext():
        shows.start()
        types.start()
        try:
            yield shows.join
        finally:
            shows.join(_FAREWELL)


@contextlib.contextmanager
def _raw() -> Iterator[None]:
    """Keys come one by one and uninterpreted; what is written is laid out in lines as ever."""
    before = termios.tcgetattr(STDIN)
    mode = termios.tcgetattr(STDIN)
    mode[0] &= ~(termios.BRKINT | termios.ICRNL | termios.INPCK | termios.ISTRIP | termios.IXON)
    mode[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG)
    termios.tcsetattr(STDIN, termios.TCSADRAIN, mode)
    try:
        yield
    finally:
        termios.tcsetattr(STDIN, termios.TCSADRAIN, before)


def _show(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # nobody reads our output any more
        while data := sock.recv(65_536):
            view = memoryview(data)
            while view:
                view = view[os.write(STDOUT, view) :]


def _type(sock: socket.socket, escape: Callable[[], object] | None) -> None:
    with contextlib.suppress(OSError):  # the guest has gone
        while data := os.read(STDIN, 4096):
            if escape is not None:
                for _ in range(data.count(ESCAPE)):
                    escape()
                data = data.replace(ESCAPE, b"")
            sock.sendall(data)
