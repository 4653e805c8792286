"""A command on a pseudo-terminal, and the screen that it draws."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from types import TracebackType

import pyte

from .vsock import PATIENCE, PROGRAM


class Terminal:
    """``vsock`` with ``arguments`` on a terminal of 100 columns and 30 lines."""

    def __init__(self, environment: dict[str, str], *arguments: object) -> None:
        self._screen = pyte.Screen(100, 30)
        self._stream = pyte.ByteStream(self._screen)
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self._before = termios.tcgetattr(theirs)
        self._theirs = theirs
        self.process = subprocess.Popen(
            [*PROGRAM, *map(str, arguments)],
            env={**environment, "TERM": "xterm-256color"},
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        assert self.process.stderr is not None
        self.process.stderr.close()
        os.close(self._ours)
        os.close(self._theirs)

    @property
    def lines(self) -> list[str]:
        """Lines of the screen."""
        return [line.rstrip() for line in self._screen.display]

    def press(self, keys: str) -> None:
        """Press keys."""
        os.write(self._ours, keys.encode())

    def wait_for(self, condition: Callable[[list[str]], bool]) -> list[str]:
        """Wait until the screen satisfies ``condition``, and return its lines."""
        deadline = time.monotonic() + PATIENCE
        while not condition(self.lines):
            left = deadline - time.monotonic()
            assert left > 0, "\n".join(self.lines)
            if select.select([self._ours], [], [], left)[0]:
                self._stream.feed(os.read(self._ours, 65536))
        return self.lines

    def finish(self, status: int = 0) -> str:
        """Wait until the command exits with ``status``, and return its standard error.

        Its output is read meanwhile, because a full terminal would block the command.  The
        terminal's attributes must be those from before the command.
        """
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < deadline
            if select.select([self._ours], [], [], 0.1)[0]:
                self._stream.feed(os.read(self._ours, 65536))
        assert self.process.stderr is not None
        complaint = self.process.stderr.read().decode()
        assert self.process.returncode == status, complaint
        assert termios.tcgetattr(self._theirs) == self._before
        return complaint
