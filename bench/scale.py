"""What a connect costs vsockd as the number of contexts and listeners grows."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator

import vsockets
from vsockets import VMADDR_CID_ANY, VMADDR_PORT_ANY
from vsockets.testing import PrivateFabric

_CONNECTS = 2000


@contextlib.contextmanager
def many(contexts: int, listeners: int, tick: Callable[[], None]) -> Iterator[Callable[[], float]]:
    """A fabric with so many guests, and so many listeners on its host.

    Yields a function that connects from the last guest and tells vsockd's processor time for
    each connect, in microseconds.
    """
    _allow_descriptors(listeners + 1000)
    with PrivateFabric() as fabric, contextlib.ExitStack() as stack:
        guest = fabric.guest()
        for _ in range(contexts - 1):
            guest = fabric.guest()
            tick()
        for _ in range(listeners):
            server = vsockets.create_server((VMADDR_CID_ANY, VMADDR_PORT_ANY), context=fabric.host)
            stack.enter_context(server)
            tick()

        def measure() -> float:
            before = _processor_time(fabric.pid)
            for _ in range(_CONNECTS):
                with vsockets.create_connection(server.getsockname(), context=guest):
                    server.accept()[0].close()
            return (_processor_time(fabric.pid) - before) / _CONNECTS * 1e6

        yield measure


def _processor_time(pid: int) -> float:
    with open(f"/proc/{pid}/schedstat") as schedstat:
        return int(schedstat.read().split()[0]) / 1e9


def _allow_descriptors(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, max(count, hard)))
