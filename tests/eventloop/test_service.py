"""Services that run until a signal arrives."""

from __future__ import annotations

import subprocess
import sys

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
