"""Run ``vsock`` as users do, each command in its own process."""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

#: Timeout of every wait, in seconds.
PATIENCE = 60.0

PROGRAM = (sys.executable, "-m", "vsockets.cli")


class Running:
    """A ``vsock`` in the background; its streams are pipes unless they are files."""

    def __init__(
        self,
        arguments: tuple[object, ...],
        environment: dict[str, str],
        stdin: int = subprocess.PIPE,
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
    ) -> None:
        self.process = subprocess.Popen(
            [*PROGRAM, *map(str, arguments)],
            env=environment,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            bufsize=0,
        )

    def write(self, data: bytes) -> None:
        """Write to its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(data)

    def end_of_input(self) -> None:
        """Close its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def read_line(self) -> str:
        """Return the next line of its standard output, without its end."""
        return _read_line(self.process.stdout)

    def error_line(self) -> str:
        """Return the next line of its standard error, without the prefix ``vsock: ``."""
        return _read_line(self.process.stderr).removeprefix("vsock: ")

    def port(self) -> int:
        """Return the port that ``vsock listen any`` prints."""
        line = self.error_line()
        found = re.fullmatch(r"listening on \d+:(\d+)", line)
        assert found, line
        return int(found[1])

    def finish(self, data: bytes | None = None, expect: int = 0) -> tuple[bytes, str]:
        """Write ``data`` to standard input, wait for the end, and return the remaining output."""
        if self.process.stdin is not None and self.process.stdin.closed:
            self.process.stdin = None  # communicate() would flush it
        out, err = self.process.communicate(data, PATIENCE)
        assert self.process.returncode == expect, err.decode()
        return out, err.decode()

    def close(self) -> None:
        """Kill it if it still runs."""
        self.process.kill()
        self.process.wait(PATIENCE)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


class Vsock:
    """The command line, working on the fabric in one state folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "VSOCKETS_DIR": str(folder)}
        self._running: list[Running] = []

    def __enter__(self) -> Vsock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for running in self._running:
            running.close()

    def __call__(
        self,
        *arguments: object,
        data: bytes = b"",
        expect: int | None = 0,
        patience: float = PATIENCE,
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end with ``data`` as standard input, and check the exit status."""
        done = subprocess.run(
            [*PROGRAM, *map(str, arguments)],
            env=self.environment,
            input=data,
            capture_output=True,
            timeout=patience,
            check=False,
        )
        if expect is not None:
            assert done.returncode == expect, done
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
        )

    def start(
        self,
        *arguments: object,
        stdin: int = subprocess.PIPE,
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
    ) -> Running:
        """Run in the background; it is killed at the end of the test."""
        running = Running(arguments, self.environment, stdin, stdout, stderr)
        self._running.append(running)
        return running

    def find_modules_in(self, folder: Path) -> None:
        """Make Python search ``folder`` for modules first."""
        rest = self.environment.get("PYTHONPATH")
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), rest)))

    def json(self, *arguments: object) -> Any:
        """Return the value that a command prints with ``--json``."""
        return json.loads(self(*arguments, "--json").stdout)

    def fails(self, *arguments: object, status: int = 1) -> str:
        """Return the one line printed by a failing command, without the prefix ``vsock: ``."""
        done = self(*arguments, expect=status)
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("vsock: ")
        return line.removeprefix("vsock: ")

    def fail(self, *cases: tuple[str, int, str]) -> None:
        """Check that each command line fails with its exit status and a line with its text.

        All run concurrently: most of their time is Python's start-up.
        """
        started = [self.start(*shlex.split(command)) for command, _, _ in cases]
        for running, (command, status, text) in zip(started, cases, strict=True):
            printed, errors = running.finish(expect=status)
            assert printed == b"", command
            assert errors.count("\n") == 1, errors
            assert errors.startswith("vsock: "), errors
            assert text in errors, command


def _read_line(stream: IO[bytes] | None) -> str:
    assert stream is not None
    line = b""
    deadline = time.monotonic() + PATIENCE
    while not line.endswith(b"\n"):
        readable, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
        assert readable, f"waited {PATIENCE} s for more than {line!r}"
        byte = os.read(stream.fileno(), 1)
        assert byte, f"the end came after {line!r}"
        line += byte
    return line.decode().removesuffix("\n")
