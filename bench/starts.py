"""Starts of programs, from a wheel that is installed with its bytecode."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from vsockets.testing import PrivateFabric

_ROOT = Path(__file__).parent.parent


class Installed(NamedTuple):
    """An environment with the wheel, and a running fabric for its programs."""

    bin: Path
    environment: dict[str, str]

    def start(self, *command: str) -> float:
        """Return the milliseconds of a program, from its start to its end."""
        program = [str(self.bin / command[0]), *command[1:]]
        began = time.perf_counter()
        subprocess.run(
            program, env=self.environment, stdout=subprocess.DEVNULL, timeout=60, check=True
        )
        return (time.perf_counter() - began) * 1e3


@contextmanager
def installed() -> Iterator[Installed]:
    """Build and install the wheel in a temporary environment while the context lasts."""
    with tempfile.TemporaryDirectory(prefix="starts-") as name, PrivateFabric() as fabric:
        folder = Path(name)
        environment = {**fabric.environment(fabric.host)}
        for unwanted in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE"):
            environment.pop(unwanted, None)
        run = partial(subprocess.run, env=environment, stdout=subprocess.DEVNULL, check=True)
        run([sys.executable, "-m", "venv", str(folder / "venv")])
        python = str(folder / "venv" / "bin" / "python")
        pip = python, "-m", "pip", "--quiet", "--disable-pip-version-check"
        run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(_ROOT)])
        (wheel,) = folder.glob("*.whl")
        run([*pip, "install", "--compile", str(wheel)])
        environment["PATH"] = os.pathsep.join((str(Path(python).parent), os.environ["PATH"]))
        yield Installed(Path(python).parent, environment)


PROGRAMS = {
    "vsock run -- true": ("vsock", "run", "--", "true"),
    "vsock ls": ("vsock", "ls"),
    "vsock --version": ("vsock", "--version"),
    "import vsockets": ("python", "-c", "import vsockets"),
    "python -c pass": ("python", "-c", "pass"),
}
