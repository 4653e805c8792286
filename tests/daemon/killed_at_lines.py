"""A vsockd that is killed at one line of its code after another.

Its arguments are two numbers, the name of a function or "", and then those of vsockd.  The first
vsockd ends after so many lines of vsockd's code, or of the function's, counted from the time it
serves, and each later one after so many more.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import vsockets.daemon
from vsockets.control import Control
from vsockets.daemon import __main__ as program
from vsockets.daemon.vsockd import Vsockd

_FOLDER = str(Path(vsockets.daemon.__file__).parent)
_NUMBER = struct.Struct("q")


class KilledVsockd(Vsockd):
    """A vsockd that counts the lines that it executes, and ends at one of them."""

    numbers = mmap.mmap(-1, mmap.PAGESIZE)  # shared by one after another
    step = 1
    function = ""

    def run(
        self, announce_ready: Callable[[], None] = lambda: None, lifeline: int | None = None
    ) -> bool:
        """Serve as vsockd does, until it is killed."""
        (left,) = _NUMBER.unpack_from(self.numbers)
        _NUMBER.pack_into(self.numbers, 0, left + self.step)

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal left
            if event == "call":
                code = frame.f_code
                counts = code.co_filename.startswith(_FOLDER)
                return trace if counts and self.function in ("", code.co_name) else None
            left -= event == "line"
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        def ready() -> None:
            announce_ready()
            sys.settrace(trace)

        return super().run(ready, lifeline)


class Killed:
    """The vsockd of this module, and how often it was killed."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder = folder
        self._log = log

    @property
    def kills(self) -> int:
        return self._log.read_text().count("starting it again")


@contextlib.contextmanager
def killed_vsockd(scratch: Path, first: int, step: int, function: str = "") -> Iterator[Killed]:
    """Run vsockd in a folder below ``scratch``; it is killed as the module's arguments say."""
    configuration, log = scratch / "configuration", scratch / "log"
    configuration.mkdir()
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "daemon.killed_at_lines", str(first), str(step)]
    command.append(function)
    command += ["--dir", str(scratch / "fabric"), "--config", str(configuration)]
    command += ["--ready-fd", str(writer), "--restarts", "100000"]
    search_path = [str(Path(__file__).parents[1]), str(Path(_FOLDER).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search_path)}
    with open(log, "wb") as file, open(reader, "rb") as ready:
        process = subprocess.Popen(command, env=environment, pass_fds=[writer], stderr=file)
        os.close(writer)
        try:
            assert ready.read(1), log.read_text()
            yield Killed(scratch / "fabric", log)
        finally:
            process.terminate()
            process.wait()


def add_guest(folder: Path, **settings: Any) -> Path:
    """Return the folder of a new guest without narrow limits."""
    limits = {"sockets": 100_000, "request_rate": 1_000_000, "pending_connects": 10_000}
    with Control(folder) as control:
        return Path(control.add_context(limits=limits, **settings)["folder"])


if __name__ == "__main__":
    first, KilledVsockd.step = int(sys.argv[1]), int(sys.argv[2])
    KilledVsockd.function = sys.argv[3]
    _NUMBER.pack_into(KilledVsockd.numbers, 0, first)
    del sys.argv[1:4]
    vars(program)["Vsockd"] = KilledVsockd
    sys.exit(program.main())
