"""Cost, to two processes, of a third process that watches their stream for its end.

    python -m bench.watching [--rounds N]

Two processes on one core exchange 64 bytes over a socketpair whose ends this process watches, each
way in turns; the processor time of both, by getrusage, beside a stream that is not watched.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import select
import socket
import statistics
from collections.abc import Callable

_NUMBER = 20_000
_IN_CLOSE = 0x18
_EXCLUSIVE = 1 << 28

_libc = ctypes.CDLL(None, use_errno=True)

#: A way to watch the ends, and returns the descriptor that watches.
Watch = Callable[[list[socket.socket]], int]


def _by_epoll(events: int) -> Watch:
    def watch(ends: list[socket.socket]) -> int:
        epoll = os.dup((made := select.epoll()).fileno())
        for end in ends:
            made.register(end, events)
        if events & select.EPOLLONESHOT:
            made.poll(0)  # reports the ends writable, which disarms them
        return epoll

    return watch


def _by_inotify(ends: list[socket.socket]) -> int:
    inotify = int(_libc.inotify_init())
    for end in ends:
        path = b"/proc/self/fd/%d" % end.fileno()
        assert _libc.inotify_add_watch(inotify, path, _IN_CLOSE) >= 0
    return inotify


def _connecting_end(watch: Watch) -> Watch:
    return lambda ends: watch(ends[:1])


def _accepting_end(watch: Watch) -> Watch:
    return lambda ends: watch(ends[1:])


_EDGE = _by_epoll(select.EPOLLET)
_WAYS: dict[str, Watch | None] = {
    "none": None,
    "epoll, EPOLLHUP only (events=0)": _by_epoll(0),
    "epoll, EPOLLRDHUP": _by_epoll(select.EPOLLRDHUP),
    "epoll, EPOLLET": _EDGE,
    "epoll, EPOLLET | EPOLLRDHUP": _by_epoll(select.EPOLLET | select.EPOLLRDHUP),
    "epoll, EPOLLET | EPOLLEXCLUSIVE": _by_epoll(select.EPOLLET | _EXCLUSIVE),
    "epoll, EPOLLONESHOT, disarmed": _by_epoll(select.EPOLLONESHOT | select.EPOLLOUT),
    "epoll, EPOLLET, connecting end only": _connecting_end(_EDGE),
    "epoll, EPOLLET, accepting end only (vsockd's)": _accepting_end(_EDGE),
    "inotify, IN_CLOSE": _by_inotify,
}


def _processor_time() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _round_trips(watch: Watch | None) -> float:
    """Return the microseconds of processor time of a round trip."""
    ends = list(socket.socketpair())
    watcher = watch(ends) if watch else -1
    before = _processor_time()
    children = []
    for number, end in enumerate(ends):
        pid = os.fork()
        if not pid:
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            ends[1 - number].close()
            if number == 0:
                for _ in range(_NUMBER):
                    end.send(bytes(64))
                    end.recv(64)
            else:
                while data := end.recv(64):
                    end.send(data)
            os._exit(0)
        children.append(pid)
    for end in ends:
        end.close()
    for pid in children:
        os.waitpid(pid, 0)
    if watcher >= 0:
        os.close(watcher)
    return (_processor_time() - before) / _NUMBER * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.watching", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    figures: dict[str, list[float]] = {name: [] for name in _WAYS}
    for number in range(rounds):
        for name in list(_WAYS)[:: 1 if number % 2 else -1]:
            figures[name].append(_round_trips(_WAYS[name]))
    for name, times in figures.items():
        ratios = [one / none for one, none in zip(times, figures["none"], strict=True)]
        print(f"{name:46} {statistics.median(times):.2f} us {statistics.median(ratios):6.3f}")


if __name__ == "__main__":
    main()
