"""A guest's serial console on the terminal, or on redirected standard input and output."""

from __future__ import annotations

import contextlib
import os
import socket
import termios
import threading
from collections.abc import Callable, Iterator

STDIN, STDOUT = 0, 1

#: Ctrl-], as in telnet and virsh; not sent to the guest.
ESCAPE = b"\x1d"

#: Seconds for showing the guest's last output.
_LAST_OUTPUT_SECONDS = 5.0


@contextlib.contextmanager
def console(sock: socket.socket, escape: Callable[[], object]) -> Iterator[Callable[[], None]]:
    """Connect ``sock`` with standard input and output during the with block.

    On a terminal, all keys are sent to the guest except Ctrl-], which calls ``escape`` in a thread.
    After the block, remaining output is shown and the terminal is restored.  The block gets a
    function that waits for the end of the guest's output.
    """
    terminal = os.isatty(STDIN)
    # Threads, so that a stopped terminal blocks only the console.
    output = threading.Thread(target=_copy_output, args=(sock,), daemon=True)
    keyboard = threading.Thread(
        target=_copy_input, args=(sock, escape if terminal else None), daemon=True
    )
    with _raw() if terminal else contextlib.nullcontext():
        output.start()
        keyboard.start()
        try:
            yield output.join
        finally:
            output.join(_LAST_OUTPUT_SECONDS)


@contextlib.contextmanager
def _raw() -> Iterator[None]:
    """Make the terminal pass on each key uninterpreted during the with block.

    Output is processed as usual.
    """
    before = termios.tcgetattr(STDIN)
    mode = termios.tcgetattr(STDIN)
    mode[0] &= ~(termios.BRKINT | termios.ICRNL | termios.INPCK | termios.ISTRIP | termios.IXON)
    mode[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG)
    termios.tcsetattr(STDIN, termios.TCSADRAIN, mode)
    try:
        yield
    finally:
        termios.tcsetattr(STDIN, termios.TCSADRAIN, before)


def _copy_output(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # standard output is closed
        while data := sock.recv(65_536):
            view = memoryview(data)
            while view:
                view = view[os.write(STDOUT, view) :]


def _copy_input(sock: socket.socket, escape: Callable[[], object] | None) -> None:
    with contextlib.suppress(OSError):  # the guest has ended
        while data := os.read(STDIN, 4096):
            if escape is not None:
                for _ in range(data.count(ESCAPE)):
                    escape()
                data = data.replace(ESCAPE, b"")
            sock.sendall(data)
