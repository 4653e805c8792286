"""Counting what a guest holds, when it has reached a limit as far as is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import monotonic

from ..fabric import Context
from ..limits import COUNT_AGAIN
from .channel import Channel


class Allowance:
    """Guests' limits, as far as keeping to them needs the kernel's word on what has gone.

    Counting anew costs time, and a guest at its limit must not make vsockd spend it again and
    again: so it is done only so often.
    """

    def __init__(
        self, forget_what_has_gone: Callable[[], None], listeners: Callable[[], Iterable[Channel]]
    ) -> None:
        self._forget_what_has_gone = forget_what_has_gone
        self._listeners = listeners
        self._counted = 0.0

    def make_room(self, context: Context) -> None:
        """Forget what a guest with as many sockets as it may have does not hold any more."""
        if context.sockets >= context.limits.sockets and self._may_count():
            self._forget_what_has_gone()

    def require_patience(self, context: Context, count: Callable[[], None] | None = None) -> None:
        """Raise Denied when too many connections of a guest wait.  ``count`` has those counted
        that wait for the one asked for now."""
        most = context.limits.pending_connects
        if context.pending < most or not context.is_guest:
            return
        if count is not None:
            count()
        if context.pending >= most and self._may_count():
            for listener in self._listeners():
                listener.count_waiting()
        context.require_patience()

    def _may_count(self) -> bool:
        now = monotonic()
        if now - self._counted < COUNT_AGAIN:
            return False
        self._counted = now
        return True
