"""Synchronisation of a virtual machine's life cycle with its context's.  No I/O.

QEMU reports what its guest does (STOP, RESUME, RESET, MIGRATION), vsockd reports changes of the
context (suspend, resume, power-off, removed).  A change on one side is applied to the other:

    =================================  ==================================
    Event of QEMU                      Applied to the context
    =================================  ==================================
    STOP                               suspend
    STOP during a migration            migrate
    RESUME                             resume
    RESET                              reset
    =================================  ==================================

    =================================  ==================================
    Event of vsockd                    Applied to QEMU
    =================================  ==================================
    suspend                            stop
    resume                             cont
    power-off, removed                 quit
    =================================  ==================================

The side to which a change is applied reports it as well; this echo must not be applied to the first
side again.  Requests whose event is outstanding are therefore remembered, in order, and the next
matching event is taken as the echo.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from itertools import count


class LifeCycleAction(Enum):
    """A request to the context or to QEMU."""

    SUSPEND = "suspend"
    RESUME = "resume"
    MIGRATE = "migrate"
    RESET = "reset"
    STOP = "stop"
    CONT = "cont"
    QUIT = "quit"

    @property
    def is_for_qemu(self) -> bool:
        """True if this is a command of QEMU's monitor."""
        return self in (LifeCycleAction.STOP, LifeCycleAction.CONT, LifeCycleAction.QUIT)


#: The request that makes a side run (True) or stop (False).
_CONTEXT = {True: LifeCycleAction.RESUME, False: LifeCycleAction.SUSPEND}
_QEMU = {True: LifeCycleAction.CONT, False: LifeCycleAction.STOP}

_MIGRATING = ("setup", "active", "postcopy-active", "pre-switchover", "device")


class _Side:
    """The known state of one side (the context or QEMU) and its outstanding requests."""

    def __init__(self, runs: bool) -> None:
        self._runs = runs
        self._outstanding: deque[tuple[int, bool]] = deque()  #: requests without an event so far
        self._numbers = count()
        self._done = count()

    @property
    def will_run(self) -> bool:
        """True if the side runs once all requests are carried out."""
        return self._outstanding[-1][1] if self._outstanding else self._runs

    def request(self, runs: bool) -> None:
        """Record a request to run or to stop."""
        self._outstanding.append((next(self._numbers), runs))

    def complete(self, runs: bool, done: bool) -> None:
        """Record the outcome of the oldest outstanding request: whether it was carried out."""
        request = next(self._done), runs
        # The event of another change may have been taken as its echo.
        if not done and request in self._outstanding:
            self._outstanding.remove(request)

    def on_event(self, runs: bool) -> bool:
        """Record the state that an event reports; return whether it is not an echo of a request."""
        self._runs = runs
        if self._outstanding and self._outstanding[0][1] is runs:
            self._outstanding.popleft()
            return False
        return True


class LifeCycle:
    """The state of the context and QEMU.  Event methods return the requests that follow."""

    def __init__(self, context_runs: bool) -> None:
        """Begin before the guest's start; ``context_runs``: the context is not suspended."""
        self._context = _Side(context_runs)
        self._qemu = _Side(False)
        self._migrating = False

    def start(self) -> list[LifeCycleAction]:
        """Return the first requests: the guest runs if its context does."""
        return self._request_qemu(self._context.will_run)

    def on_qemu_event(self, event: str, status: str = "") -> list[LifeCycleAction]:
        """Return the requests after an event of QEMU; ``status`` is that of MIGRATION."""
        match event:
            case "MIGRATION":
                self._migrating = status in _MIGRATING
            case "RESET":
                return [LifeCycleAction.RESET]
            case "STOP" if self._migrating:
                self._qemu.on_event(False)
                return [LifeCycleAction.MIGRATE]
            case "STOP" | "RESUME":
                runs = event == "RESUME"
                if self._qemu.on_event(runs) and self._context.will_run is not runs:
                    self._context.request(runs)
                    return [_CONTEXT[runs]]
        return []

    def on_context_event(self, change: str) -> list[LifeCycleAction]:
        """Return the requests after a change of the context."""
        match change:
            case "suspend" | "resume":
                runs = change == "resume"
                if self._context.on_event(runs):
                    return self._request_qemu(runs)
            case "power-off" | "removed":
                return [LifeCycleAction.QUIT]
        return []

    def completed(self, action: LifeCycleAction, done: bool) -> None:
        """Record that a request was carried out, or that it failed and causes no event.

        Call this for each request, in the order in which they were returned.
        """
        for side, actions in ((self._context, _CONTEXT), (self._qemu, _QEMU)):
            for runs, known in actions.items():
                if action is known:
                    side.complete(runs, done)

    def _request_qemu(self, runs: bool) -> list[LifeCycleAction]:
        if self._qemu.will_run is runs:
            return []
        self._qemu.request(runs)
        return [_QEMU[runs]]
