"""Measurement of contestants in turn, and their comparison.

The speed of a machine changes during a run, so single times are not reported.  The contestants
take turns in rounds, each round yields a ratio, and the median of the ratios is reported.
"""

from __future__ import annotations

import gc
import os
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

#: Longest life of a benchmark's process, in seconds.
LIFETIME = 120


@dataclass
class Series:
    """The figures of one contestant, one for each round."""

    name: str
    unit: str
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Return the median over the rounds."""
        return statistics.median(self.values)

    @property
    def slowest(self) -> float:
        """Return the figure of the worst round: the least rate, or the longest time."""
        return min(self.values) if "/" in self.unit else max(self.values)

    def ratio_to(self, other: Series) -> float:
        """Return the median of the ratios to ``other``, round by round."""
        return statistics.median(a / b for a, b in zip(self.values, other.values, strict=True))


def take_turns(
    contestants: dict[str, Callable[[], float]],
    unit: str,
    rounds: int,
    tick: Callable[[], None],
) -> dict[str, Series]:
    """Run every contestant once in each round, in reversed order in every second round."""
    series = {name: Series(name, unit) for name in contestants}
    for number in range(rounds):
        names = list(contestants)
        for name in names if number % 2 == 0 else reversed(names):
            series[name].values.append(contestants[name]())
            tick()
    return series


@contextmanager
def child(work: Callable[[], None]) -> Iterator[int]:
    """Run ``work`` in a forked process, which is killed at the end of the context."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(LIFETIME)
            gc.disable()
            work()
            status = 0
        finally:
            os._exit(status)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def run_children(works: list[Callable[[], None]]) -> float:
    """Run ``works`` in forked processes at the same time; return the seconds until all end."""
    start_reader, start_writer = os.pipe()
    pids = []
    for work in works:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                signal.alarm(LIFETIME)
                os.close(start_writer)
                os.read(start_reader, 1)
                work()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        pids.append(pid)
    os.close(start_reader)
    begin = time.perf_counter()
    os.close(start_writer)
    failed = [pid for pid in pids if os.waitpid(pid, 0)[1]]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(pids)} benchmark processes failed")
    return time.perf_counter() - begin


def processor_time(pid: int) -> float:
    """Return the processor time that a process has used, in seconds."""
    with open(f"/proc/{pid}/schedstat") as schedstat:
        return int(schedstat.read().split()[0]) / 1e9
