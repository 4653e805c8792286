"""Events and their subscribers, and the audit log of denials: client, source, destination, rule.

The peer gets an errno only; the administrator gets the details here.  A party (a guest, or a user
of the host) can cause denials as fast as it sends requests, so only a limited number per second is
logged for each party; the party's next line has the number of denials left out.  All denials are
counted in ``Context.counts``.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Collection, Iterable
from enum import Enum
from typing import Any

from ...fabric import Connection, Context, Credentials, Denied
from ...logs import Throttle
from ...model.text import word
from ...protocol import Op
from ..channel import Channel


class Topic(Enum):
    """A topic to subscribe to."""

    CONTEXT = "context"  #: a guest was added, removed, or changed its state
    DENIAL = "denial"  #: a request was denied: a line of the audit log
    DISCONNECT = "disconnect"  #: an administrator has disconnected a stream
    VSOCKD = "vsockd"  #: vsockd was replaced


class Events:
    """The subscribers of events.

    An event is a JSON object with ``topic``, ``time`` (seconds since the epoch) and the topic's own
    keys.
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

    def topics_of(self, callback: Callable[[dict[str, Any]], None]) -> list[str]:
        """Return the topics that ``callback`` is subscribed to."""
        return sorted(topic.value for topic in self._subscribers.get(callback, ()))

    def publish(self, topic: Topic, **facts: Any) -> None:
        """Send an event to the subscribers of ``topic``."""
        event = {"topic": topic.value, "time": round(time.time(), 3), **facts}
        for callback, topics in list(self._subscribers.items()):
            if topic in topics:
                callback(event)


log = logging.getLogger("vsockd.audit")

#: Names of the operations in the log.
OPERATIONS = {
    Op.BIND: "bind",
    Op.LISTEN: "listen",
    Op.CONNECT: "connect",
    Op.UPDATE: "set buffer sizes",
    Op.BIND_DATAGRAM: "bind a datagram socket",
    Op.ROUTE: "send a datagram",
    Op.QUERY: "query",
    Op.LOCAL_CID: "ask for the local CID",
    Op.CATCH_ALL: "take a guest's datagrams",
    Op.CAPTURE: "capture",
    Op.RESIZE: "set buffer sizes",
    Op.BIND_SOCKET: "bind",
}


class Audit:
    """Writer of the audit log."""

    def __init__(self, events: Events, rate: int) -> None:
        self._events = events
        self._throttle = Throttle(rate)

    def set_rate(self, rate: int) -> None:
        """Set how many denials are logged per second and party."""
        self._throttle.rate = rate

    def record(
        self,
        context: Context,
        program: Channel,
        denied: Denied,
        operation: str,
        source: tuple[int, int] | None,
        destination: tuple[int, int] | None,
    ) -> None:
        """Log that ``program``, in ``context``, was denied ``operation``."""
        context.counts.denials[denied.rule] += 1
        left_out = self._throttle.admit(program.party)
        if left_out is None:
            return
        asker = program.asker
        facts: dict[str, Any] = {
            "context": context.cid,
            "operation": operation,
            "source": source,
            "destination": destination,
            "rule": denied.rule.value,
            "reason": denied.reason,
            "errno": errno.errorcode.get(denied.errno, str(denied.errno)),
            "pid": asker.credentials.pid,
            "uid": asker.credentials.uid,
            "gid": asker.credentials.gid,
            "executable": asker.executable(),
            "left_out": left_out,
        }
        message = _message(facts)
        log.warning("%s", message, extra={"facts": facts, "admitted": True})
        self._events.publish(Topic.DENIAL, **facts, message=message)

    def record_disconnect(self, stream: Connection, asker: Credentials) -> None:
        """Log that an administrator has disconnected ``stream``."""
        facts: dict[str, Any] = {
            "source": stream.local,
            "destination": stream.peer,
            "pid": asker.pid,
            "uid": asker.uid,
            "gid": asker.gid,
        }
        message = (
            f"disconnected: {_address(stream.local)} to {_address(stream.peer)}; "
            f"requested by pid {asker.pid} uid {asker.uid}"
        )
        log.warning("%s", message, extra={"facts": facts, "admitted": True})
        self._events.publish(Topic.DISCONNECT, **facts, message=message)


def _message(facts: dict[str, Any]) -> str:
    way = " to ".join(_address(facts[side]) for side in ("source", "destination") if facts[side])
    more = f" ({facts['left_out']} more were left out)" if facts["left_out"] else ""
    return (
        f"denied: {facts['operation']} {way}: {facts['reason']} [{facts['rule']}, "
        f"{facts['errno']}]; pid {facts['pid']} uid {facts['uid']} "
        f"{word(facts['executable'] or '?')}"
        f"{more}"
    )


def _address(address: tuple[int, int]) -> str:
    cid, port = ("any" if number == 0xFFFF_FFFF else number for number in address)
    return f"{cid}:{port}"
