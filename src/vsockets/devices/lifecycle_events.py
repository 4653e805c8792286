"""Subscription of a device to life-cycle events of contexts."""

from __future__ import annotations

from collections.abc import Callable

from ..control import Events
from .client import DeviceClient
from .loop import DeviceLoop

#: Changes after which the guest's connections are reset, all at once.
INTERRUPTIONS = ("resume", "migrate", "ft-on")


def subscribe(
    loop: DeviceLoop, fabric: DeviceClient, events: Events, on_event: Callable[[int, str], None]
) -> None:
    """Call ``on_event`` for each event: a context's CID, and the change (such as ``resume``).

    The subscription ends when vsockd closes ``events``.  Pending events are handled before
    ``fabric`` creates a stream, so that an interruption resets no stream that is opened after the
    interruption.
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
