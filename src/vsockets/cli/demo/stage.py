"""The environment of ``vsock demo``: a private fabric, and programs that end with it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...attachment import Attachment
from ...testing import PrivateFabric
from ..errors import CliError

_PROGRAMS = Path(__file__).with_name("programs.py")

#: The command ``vsock``.
VSOCK = (sys.executable, "-m", "vsockets.cli")

_LISTENING = b"vsock: listening on "

#: Timeout of every wait, in seconds; none takes more than two.
PATIENCE = 20.0

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Defer signals that end this process to the end of the with block."""
    came: list[int] = []

    def note(number: int, _: object) -> None:
        came.append(number)

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _SIGNALS:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


class Program:
    """A program in a child process; ``services`` are the programs it may depend on."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: dict[str, str],
        services: list[Program],
    ) -> None:
        self.name = name
        self._services = services
        self._received = b""
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process only, which ends the programs
        )
        self._ended = os.pidfd_open(self._process.pid)

    def write(self, line: str) -> None:
        """Write a line to the program's standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def read(self) -> dict[str, Any]:
        """Return the next line of JSON that the program prints.

        Raises CliError if the line is not JSON, or a service that the program may need has failed.
        """
        line = self._read_line()
        try:
            said = json.loads(line)
        except ValueError:  # a traceback
            self._received = line + self._received
            raise self._failure() from None
        assert isinstance(said, dict)
        return said

    def read_address(self) -> str:
        """Return the address that a ``vsock`` command reports to listen on.

        Raises CliError if the next line is another message.
        """
        line = self._read_line()
        if not line.startswith(_LISTENING):
            self._received = line + self._received
            raise self._failure()
        return line.removeprefix(_LISTENING).decode().strip()

    def end(self) -> None:
        """Kill the program, and wait for its end."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Kill the program, and close its streams."""
        self.end()
        os.close(self._ended)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def _read_line(self) -> bytes:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        others = {service._ended: service for service in self._services if service is not self}
        deadline = time.monotonic() + PATIENCE
        while b"\n" not in self._received:
            patience = max(0.0, deadline - time.monotonic())
            readable, _, _ = select.select([fd, *others], [], [], patience)
            if not readable:
                raise CliError(f"the program {self.name} printed nothing for {PATIENCE:g} s")
            if fd not in readable:
                raise others[readable[0]]._failure()
            data = os.read(fd, 65_536)
            if not data:
                break
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _failure(self) -> CliError:
        """Return an error with the last line of the program's traceback."""
        self.end()
        assert self._process.stdout is not None
        said = (self._received + self._process.stdout.read()).decode(errors="replace")
        last_line = said.strip().rpartition("\n")[2]
        return CliError(f"the program {self.name} failed: {last_line}")


class Stage:
    """A private fabric and the programs on it, all removed at the end."""

    def __enter__(self) -> Stage:
        self._programs: list[Program] = []
        self._services: list[Program] = []
        with signals_deferred():
            self.fabric = PrivateFabric().__enter__()
        return self

    def __exit__(self, *failure: object) -> None:
        with signals_deferred():
            for program in self._programs:
                program.close()
            self.fabric.__exit__(*failure)

    def start(self, context: Attachment, role: str, *arguments: object) -> Program:
        """Start one of the demo's programs in ``context``."""
        command = [
            *(*VSOCK, "run", "--cid", str(context.cid), "--"),
            *(sys.executable, "-P", os.fspath(_PROGRAMS), role, *map(str, arguments)),
        ]
        return self.run(role, command, self.fabric.environment(context))

    def run(self, name: str, command: Sequence[str], environment: dict[str, str]) -> Program:
        """Start any program in a child process."""
        with signals_deferred():
            program = Program(name, command, environment, self._services)
            self._programs.append(program)
        return program

    def serve(self, context: Attachment, role: str, *arguments: object) -> Program:
        """Start one of the demo's programs as a service, which runs until the end."""
        service = self.start(context, role, *arguments)
        self._services.append(service)
        return service
