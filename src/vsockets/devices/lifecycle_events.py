"""What becomes of contexts, as far as a device is to do something about it."""

from __future__ import annotations

from collections.abc import Callable

from ..control import Events
from .client import DeviceClient
from .loop import DeviceLoop

#: After these a guest whose device is here is told that its connections are over, all at once.
INTERRUPTIONS = ("resume", "migrate", "ft-on")


def subscribe(
    loop: DeviceLoop, fabric: DeviceClient, events: Events, on_event: Callable[[int, str], None]
) -> None:
    """Call ``heed`` with a context's CID and what has changed, as long as vsockd is there.

    What vsockd has said by then is heard before ``fabric`` makes or is offered a stream: an
    interruption is of the streams there were, and not of one that came after it.
    """

    def drain() -> None:
        if not loop.watches(events.fileno()):
            return
        happened = events.take()
        if happened is None:
            loop.unwatch(events.fileno())
            return
        for event in happened:
            on_event(event["cid"], event["change"])

    loop.watch(events.fileno(), lambda readiness: drain())
    fabric.drain_events = drain
