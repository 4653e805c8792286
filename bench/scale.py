"""Processor time of vsockd for a connect, with growing numbers of contexts and listeners."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator

import vsockets
from vsockets import VMADDR_CID_ANY, VMADDR_PORT_ANY
from vsockets.daemon.limits import DAEMON_DESCRIPTOR_RESERVE
from vsockets.testing import PrivateFabric

from .harness import processor_time

_CONNECTS = 2000


@contextlib.contextmanager
def many(contexts: int, listeners: int, tick: Callable[[], None]) -> Iterator[Callable[[], float]]:
    """Start a fabric with this number of guests, and of listeners on its host.

    Yields a function that connects from the last guest and returns vsockd's processor time for
    each connect, in microseconds.
    """
    with PrivateFabric(log_level="warning") as fabric, contextlib.ExitStack() as stack:
        guest = fabric.guest()
        for _ in range(contexts - 1):
            guest = fabric.guest()
            tick()
        for _ in range(listeners):
            server = vsockets.create_server((VMADDR_CID_ANY, VMADDR_PORT_ANY), context=fabric.host)
            stack.enter_context(server)
            tick()

        def measure() -> float:
            before = processor_time(fabric.pid)
            for _ in range(_CONNECTS):
                with vsockets.create_connection(server.getsockname(), context=guest):
                    server.accept()[0].close()
            return (processor_time(fabric.pid) - before) / _CONNECTS * 1e6

        yield measure


def most(wanted: int, descriptors_each: int) -> int:
    """Return ``wanted``, or the number that the limit of descriptors of one process permits.

    vsockd needs two descriptors for a context and one for a listener; only root with
    CAP_SYS_RESOURCE can raise the hard limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, max(hard, 2 * wanted)))
    except ValueError:
        pass
    else:
        hard = max(hard, 2 * wanted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return min(wanted, (hard - DAEMON_DESCRIPTOR_RESERVE - 200) // descriptors_each)
