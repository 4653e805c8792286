"""Services that run until a signal arrives."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import asyncio, os, signal
from asyncio.selector_events import BaseSelectorEventLoop
from vsockets.eventloop.service import on_signals

close = BaseSelectorEventLoop._close_self_pipe

def close_and_signal(self):
    close(self)
    os.kill(os.getpid(), signal.SIGTERM)

BaseSelectorEventLoop._close_self_pipe = close_and_signal
calls = []

async def main():
    ended = asyncio.Event()
    on_signals({signal.SIGTERM: ended.set, signal.SIGHUP: lambda: calls.append("reloaded")})
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGTERM)
    await ended.wait()

asyncio.run(main())
os.kill(os.getpid(), signal.SIGTERM)
print(*calls, "ended")
"""


def test_signals_during_and_after_the_close_of_the_loop_are_ignored() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.stdout, done.stderr) == ("reloaded ended\n", "")
    assert done.returncode == 0


_SERVICE = """
import asyncio, sys
from vsockets.eventloop.service import run_service

async def main(mode):
    release = asyncio.Event()

    async def drain():
        print("draining", flush=True)
        await (release.wait() if mode == "stuck" else asyncio.sleep(0))
        print("drained", flush=True)

    async def fail():
        raise OSError("no disk")

    work = {"fails": fail, "ends": lambda: asyncio.sleep(0)}.get(mode)
    await run_service(
        lambda: print("ready", flush=True),
        work() if work else None,
        drain=drain,
        reload=lambda: print("reloaded", flush=True),
    )
    print("stopped", flush=True)

try:
    asyncio.run(main(sys.argv[1]))
except OSError as error:
    print(error)
"""


class _Service:
    """A running service; ``notifications`` receives its messages to the service manager."""

    def __init__(self, mode: str, folder: Path) -> None:
        self.notifications = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notifications.bind(str(folder / "notify"))
        self.notifications.settimeout(30)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVICE, mode],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "NOTIFY_SOCKET": str(folder / "notify")},
        )
        assert self._process.stdout is not None
        self._output = self._process.stdout

    def line(self) -> str:
        return self._output.readline().strip()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def __enter__(self) -> _Service:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._output.close()
        self.notifications.close()


def test_service_is_ready_reloads_drains_and_stops(tmp_path: Path) -> None:
    with _Service("serves", tmp_path) as service:
        assert service.line() == "ready"
        assert service.notifications.recv(100) == b"READY=1"
        service.signal(signal.SIGHUP)
        assert service.line() == "reloaded"
        service.signal(signal.SIGTERM)
        assert [service.line() for _ in range(3)] == ["draining", "drained", "stopped"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_the_drain(number: signal.Signals, tmp_path: Path) -> None:
    with _Service("stuck", tmp_path) as service:
        assert service.line() == "ready"
        service.signal(number)
        assert service.line() == "draining"
        service.signal(number)
        assert service.line() == "stopped"


@pytest.mark.parametrize(("mode", "last"), [("ends", "stopped"), ("fails", "no disk")])
def test_service_ends_with_its_work(mode: str, last: str, tmp_path: Path) -> None:
    with _Service(mode, tmp_path) as service:
        assert [service.line() for _ in range(2)] == ["ready", last]
