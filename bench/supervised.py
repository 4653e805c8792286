"""Cost of ``vsock run``: the same unmodified program with each interceptor, and without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from vsockets.testing import PrivateFabric

_ROOT = Path(__file__).parents[1]
#: Values of ``--interceptor``.
INTERCEPTORS = ("notify", "trace")
_RUN = (sys.executable, "-m", "vsockets.cli", "run", "--cid", "host")

#: A build of forty small compilations, which mostly start programs and open files.
_BUILD = "for i in $(seq 40); do gcc -O2 -Iinclude -c -o /dev/null examples/c/stream_server.c; done"
#: Starting Python, which opens more files a second than most programs.
_START = f"for i in $(seq 20); do {sys.executable} -I -c 'import json, unittest'; done"


def program(fabric: PrivateFabric, how: str, measure: str, count: int) -> float:
    """Return a figure of ``supervised_program``, for an interceptor or a family of sockets."""
    family = "vsock" if how in INTERCEPTORS else how
    command = (sys.executable, "-m", "bench.supervised_program", family, measure, str(count))
    return float(_run(fabric, command, how))


def build(fabric: PrivateFabric, how: str) -> float:
    """Return the seconds of a build, by an interceptor or plainly."""
    return _seconds(fabric, _BUILD, how)


def starts(fabric: PrivateFabric, how: str) -> float:
    """Return the seconds of starting Python twenty times, by an interceptor or plainly."""
    return _seconds(fabric, _START, how)


def _seconds(fabric: PrivateFabric, script: str, how: str) -> float:
    """Return the seconds of a shell script, without the start of ``vsock run``."""
    timed = f"date +%s.%N; {script}; date +%s.%N"
    begin, end = map(float, _run(fabric, ("sh", "-c", timed), how).split())
    return end - begin


def _run(fabric: PrivateFabric, command: tuple[str, ...], how: str) -> str:
    supervised = (*_RUN, "--interceptor", how, "--") if how in INTERCEPTORS else ()
    done = subprocess.run(
        [*supervised, *command],
        env=fabric.environment(fabric.host),
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout
