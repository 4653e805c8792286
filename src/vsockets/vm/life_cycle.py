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


class Act(Enum):
    """A request to the context or to QEMU."""

    SUSPEND = "suspend"
    RESUME = "resume"
    MIGRATE = "migrate"
    RESET = "reset"
    STOP = "stop"
    CONT = "cont"
    QUIT = "quit"

    @property
    def is_qemus(self) -> bool:
        """Return whether this is a command of QEMU's monitor."""
        return self in (Act.STOP, Act.CONT, Act.QUIT)


#: The request that makes a side run (True) or stop (False).
_CONTEXT = {True: Act.RESUME, False: Act.SUSPEND}
_QEMU = {True: Act.CONT, False: Act.STOP}

_MIGRATING = ("setup", "active", "postcopy-active", "pre-switchover", "device")


class _Side:
    """The known state of one side and its outstanding requests."""

    def __init__(self, runs: bool) -> None:
        self._runs = runs
        self._asked: deque[tuple[int, bool]] = deque()  #: requests without an event so far
        self._numbers = count()
        self._done = count()

    @property
    def will_run(self) -> bool:
        """Return whether the side runs once all requests are carried out."""
        return self._asked[-1][1] if self._asked else self._runs

    def ask(self, runs: bool) -> None:
        """Record a request to run or to stop."""
        self._asked.append((next(self._numbers), runs))

    def answer(self, runs: bool, done: bool) -> None:
        """Record whether the next request was carried out."""
        one = next(self._done), runs
        # The event of another change may have been taken as its echo.
        if not done and one in self._asked:
            self._asked.remove(one)

    def tell(self, runs: bool) -> bool:
        """Record the state that an event reports; return whether it is not an echo of a request."""
        self._runs = runs
        if self._asked and self._asked[0][1] is runs:
            self._asked.popleft()
            return False
        return True


class LifeCycle:
    """The state of both sides.  Each event method returns the requests that it causes."""

    def __init__(self, context_runs: bool) -> None:
        """Begin with a guest that does not run yet."""
        self._context = _Side(context_runs)
        self._qemu = _Side(False)
        self._migrating = False

    def begin(self) -> list[Act]:
        """Return the first requests: the guest runs if its context does."""
        return self._have_qemu(self._context.will_run)

    def qemu_says(self, event: str, status: str = "") -> list[Act]:
        """Return the requests after an event of QEMU; ``status`` is that of MIGRATION."""
        match event:
            case "MIGRATION":
                self._migrating = status in _MIGRATING
            case "RESET":
                return [Act.RESET]
            case "STOP" if self._migrating:
                self._qemu.tell(False)
                return [Act.MIGRATE]
            case "STOP" | "RESUME":
                runs = event == "RESUME"
                if self._qemu.tell(runs) and self._context.will_run is not runs:
                    self._context.ask(runs)
                    return [_CONTEXT[runs]]
        return []

    def vsockd_says(self, change: str) -> list[Act]:
        """Return the requests after a change of the context."""
        match change:
            case "suspend" | "resume":
                runs = change == "resume"
                if self._context.tell(runs):
                    return self._have_qemu(runs)
            case "power-off" | "removed":
                return [Act.QUIT]
        return []

    def did(self, act: Act, done: bool) -> None:
        """Record that a request was carried out, or that it failed and causes no event.

        Call this for each request, in the order in which they were returned.
        """
        for side, acts in ((self._context, _CONTEXT), (self._qemu, _QEMU)):
            for runs, known in acts.items():
                if act is known:
                    side.answer(runs, done)

    def _have_qemu(self, runs: bool) -> list[Act]:
        if self._qemu.will_run is runs:
            return []
        self._qemu.ask(runs)
        return [_QEMU[runs]]
