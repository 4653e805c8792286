"""Events and their subscribers."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from enum import Enum
from typing import Any


class Topic(Enum):
    """A topic to subscribe to."""

    CONTEXT = "context"  #: a guest was added, removed, or changed its state
    DENIAL = "denial"  #: a request was denied: a line of the audit log
    DISCONNECT = "disconnect"  #: an administrator has disconnected a stream


class Events:
    """The subscribers.  An event is a JSON object with ``topic``, ``time`` (seconds since the
    epoch) and the topic's own keys.
    """

    def __init__(self) -> None:
        self._subscribers: dict[Callable[[dict[str, Any]], None], Collection[Topic]] = {}

    def subscribe(
        self, callback: Callable[[dict[str, Any]], None], topics: Iterable[Topic]
    ) -> None:
        """Call ``callback`` with each event on one of ``topics`` from now on."""
        self._subscribers[callback] = frozenset(topics)

    def unsubscribe(self, callback: Callable[[dict[str, Any]], None]) -> None:
        """Stop calling ``callback``.  Does nothing if it is not subscribed."""
        self._subscribers.pop(callback, None)

    def publish(self, topic: Topic, **facts: Any) -> None:
        """Send an event to the subscribers of ``topic``."""
        event = {"topic": topic.value, "time": round(time.time(), 3), **facts}
        for callback, topics in list(self._subscribers.items()):
            if topic in topics:
                callback(event)
