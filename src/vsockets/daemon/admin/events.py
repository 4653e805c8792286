"""What happens, told to whoever has asked to hear of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from enum import Enum
from typing import Any


class Topic(Enum):
    """What one can subscribe to."""

    CONTEXT = "context"  #: a guest was added, changed its state, or was removed
    DENIAL = "denial"  #: somebody was denied something: the audit
    DISCONNECT = "disconnect"  #: an administrator has ended a stream


class Events:
    """The subscribers.  An event is a JSON object: ``topic``, ``time`` (seconds of the epoch)
    and what belongs to the topic.
    """

    def __init__(self) -> None:
        self._subscribers: dict[Callable[[dict[str, Any]], None], Collection[Topic]] = {}

    def subscribe(self, tell: Callable[[dict[str, Any]], None], topics: Iterable[Topic]) -> None:
        """Call ``tell`` with each event on one of ``topics`` from now on."""
        self._subscribers[tell] = frozenset(topics)

    def unsubscribe(self, tell: Callable[[dict[str, Any]], None]) -> None:
        """Do not call ``tell`` any more.  Harmless when it never was."""
        self._subscribers.pop(tell, None)

    def publish(self, topic: Topic, **facts: Any) -> None:
        """Tell everybody who asked."""
        event = {"topic": topic.value, "time": round(time.time(), 3), **facts}
        for tell, topics in list(self._subscribers.items()):
            if topic in topics:
                tell(event)
