"""Cost of ``vsock run``: the same unmodified program with each interceptor, and without it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from vm import downloads
from vsockets.testing import PrivateFabric

_ROOT = Path(__file__).parents[1]
#: Values of ``--interceptor``.
INTERCEPTORS = ("notify", "trace")
_RUN = (sys.executable, "-m", "vsockets.cli", "run", "--cid", "host")

_AS_IT_IS: Mapping[str, str] = MappingProxyType({})

#: A build of forty small compilations, which mostly start programs and open files.
_BUILD = "for i in $(seq 40); do gcc -O2 -Iinclude -c -o /dev/null examples/c/stream_server.c; done"
#: Each request on a connection of its own.
_REDIS = """
folder=$(mktemp -d)
{programs}/redis-server --port 0 --unixsocket $folder/s --save '' >$folder/log & server=$!
until {programs}/redis-cli -s $folder/s ping >$folder/ping 2>&1; do sleep 0.05; done
for port in $(seq 20000 20100); do
    {programs}/redis-cli -s $folder/s config set port $port | grep -q OK && break
done
{programs}/redis-benchmark -p $port -k 0 -n 5000 -c 20 -t ping_mbulk --csv 2>$folder/log
kill $server
wait
rm -r $folder
"""
#: Starting Python, which opens more files a second than most programs.
_START = f"for i in $(seq 20); do {sys.executable} -I -c 'import json, unittest'; done"


def program(fabric: PrivateFabric, how: str, measure: str, count: int) -> float:
    """Return a figure of ``supervised_program``, for an interceptor or a family of sockets."""
    family = "vsock" if how in INTERCEPTORS else how
    command = (sys.executable, "-m", "bench.supervised_program", family, measure, str(count))
    return float(_run(fabric, command, how))


def churn(fabric: PrivateFabric, how: str) -> float:
    """Return the connections a second of Debian's redis-benchmark to redis-server, over TCP."""
    root = downloads.redis()
    libraries = {"LD_LIBRARY_PATH": f"{root}/usr/lib/x86_64-linux-gnu"}
    script = _REDIS.format(programs=root / "usr/bin")
    answers = _run(fabric, ("sh", "-c", script), how, libraries).splitlines()
    return float(answers[-1].split(",")[1].strip('"'))


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


def _run(
    fabric: PrivateFabric,
    command: tuple[str, ...],
    how: str,
    environment: Mapping[str, str] = _AS_IT_IS,
) -> str:
    supervised = (*_RUN, "--interceptor", how, "--") if how in INTERCEPTORS else ()
    done = subprocess.run(
        [*supervised, *command],
        env={**fabric.environment(fabric.host), **environment},
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout
