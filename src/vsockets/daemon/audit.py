"""Every denial, written down: who, whom, and the rule.

The peer learns an errno; the administrator learns the rest, here.  A guest can be denied things
as fast as it can ask, so only so many are written each second for each context; how many were
left out is in the next line of that context.  All are counted in ``Context.counts``.
"""

from __future__ import annotations

import errno
import logging
import time
from typing import Any

from ..fabric import Connection, Context, Credentials, Denied
from ..fabric.meter import Meter
from ..wire import Op
from .credentials import Peer
from .events import Events, Topic

log = logging.getLogger("vsockd.audit")

#: What an operation is called.
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
}


class Audit:
    """The log of denials."""

    def __init__(self, events: Events, rate: int) -> None:
        self.rate = rate  #: denials a second and context
        self._events = events
        self._meters: dict[Context, Meter] = {}
        self._left_out: dict[Context, int] = {}

    def record(
        self,
        context: Context,
        program: Peer,
        denied: Denied,
        operation: str,
        source: tuple[int, int] | None,
        destination: tuple[int, int] | None,
    ) -> None:
        """Write down that ``program``, in ``context``, was denied ``operation``."""
        context.counts.denials[denied.rule] += 1
        meter = self._meters.get(context)
        if meter is None or meter.rate != self.rate:
            meter = self._meters[context] = Meter(self.rate)
        if not meter.take(time.monotonic()):
            self._left_out[context] = self._left_out.get(context, 0) + 1
            return
        facts: dict[str, Any] = {
            "context": context.cid,
            "operation": operation,
            "source": source,
            "destination": destination,
            "rule": denied.rule.value,
            "reason": denied.reason,
            "errno": errno.errorcode.get(denied.errno, str(denied.errno)),
            "pid": program.credentials.pid,
            "uid": program.credentials.uid,
            "gid": program.credentials.gid,
            "executable": program.executable(),
            "left_out": self._left_out.pop(context, 0),
        }
        message = _in_words(facts)
        log.warning(message, extra={"facts": facts})
        self._events.publish(Topic.DENIAL, **facts, message=message)

    def record_disconnect(self, stream: Connection, asker: Credentials) -> None:
        """Write down that an administrator has ended ``stream``."""
        facts: dict[str, Any] = {
            "source": stream.local,
            "destination": stream.peer,
            "pid": asker.pid,
            "uid": asker.uid,
            "gid": asker.gid,
        }
        message = (
            f"disconnected: {_address(stream.local)} to {_address(stream.peer)}; "
            f"asked for by pid {asker.pid} uid {asker.uid}"
        )
        log.warning(message, extra={"facts": facts})
        self._events.publish(Topic.DISCONNECT, **facts, message=message)

    def forget(self, context: Context) -> None:
        """The context is no more."""
        self._meters.pop(context, None)
        self._left_out.pop(context, None)


def _in_words(facts: dict[str, Any]) -> str:
    way = " to ".join(_address(facts[side]) for side in ("source", "destination") if facts[side])
    more = f" ({facts['left_out']} more were left out)" if facts["left_out"] else ""
    return (
        f"denied: {facts['operation']} {way}: {facts['reason']} [{facts['rule']}, "
        f"{facts['errno']}]; pid {facts['pid']} uid {facts['uid']} {facts['executable'] or '?'}"
        f"{more}"
    )


def _address(address: tuple[int, int]) -> str:
    cid, port = ("any" if number == 0xFFFF_FFFF else number for number in address)
    return f"{cid}:{port}"
