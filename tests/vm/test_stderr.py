"""Standard error of QEMU and the device, passed on at a limited rate."""

from __future__ import annotations

import asyncio
import re
import sys
from asyncio.subprocess import PIPE

import pytest

pytest.importorskip("qemu.qmp")

from vsockets.limits import LOG_LINES_PER_SECOND
from vsockets.vm.machine import forward_stderr


def forwarded_lines(script: str) -> list[str]:
    lines: list[str] = []

    async def run() -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", f"import sys\n{script}", stderr=PIPE
        )
        await forward_stderr(process, "QEMU", lines.append)
        assert await process.wait() == 0

    asyncio.run(run())
    return lines


def test_flood_of_lines_is_limited() -> None:
    lines = forwarded_lines("for n in range(5000): print('line', n, file=sys.stderr)")
    assert lines[0] == "QEMU: line 0"
    assert LOG_LINES_PER_SECOND <= len(lines) < 1000
    counts = [re.search(r"\((\d+) more were left out\)$", line) for line in lines]
    assert len(lines) + sum(int(found[1]) for found in counts if found) <= 5000


def test_endless_line_is_dropped() -> None:
    """An endless line is dropped and does not block the process."""
    lines = forwarded_lines(
        "sys.stderr.write('x' * 1_000_000); print('', 'end', sep='\\n', file=sys.stderr)"
    )
    assert lines[-1] == "QEMU: end"
