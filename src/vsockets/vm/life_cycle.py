"""A virtual machine's life and its context's, each following the other.  No I/O.

QEMU tells what its guest does (STOP, RESUME, RESET, MIGRATION), vsockd what became of the context
(suspend, resume, power-off, removed).  What happens on one side is done to the other:

    =================================  ==================================
    QEMU says                          the context's
    =================================  ==================================
    STOP                               suspend
    STOP while it migrates             migrate
    RESUME                             resume
    RESET                              reset
    =================================  ==================================

    =================================  ==================================
    vsockd says                        QEMU's
    =================================  ==================================
    suspend                            stop
    resume                             cont
    power-off, removed                 quit
    =================================  ==================================

Each thing that is done so is told of, too, by the side it was done to; that must not be done to
the first side again.  So what was asked for and not yet told of is remembered, in order, and the
next such event is taken for its echo.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from itertools import count


class Act(Enum):
    """Something to do: to the context, or to QEMU."""

    SUSPEND = "suspend"
    RESUME = "resume"
    MIGRATE = "migrate"
    RESET = "reset"
    STOP = "stop"
    CONT = "cont"
    QUIT = "quit"

    @property
    def is_qemus(self) -> bool:
        """Whether it is a command of QEMU's monitor."""
        return self in (Act.STOP, Act.CONT, Act.QUIT)


#: By whether it runs then.
_CONTEXT = {True: Act.RESUME, False: Act.SUSPEND}
_QEMU = {True: Act.CONT, False: Act.STOP}

_MIGRATING = ("setup", "active", "postcopy-active", "pre-switchover", "device")


class _Side:
    """What is known of one of the two."""

    def __init__(self, runs: bool) -> None:
        self._runs = runs
        self._asked: deque[tuple[int, bool]] = deque()  #: not yet told of, each with a number
        self._numbers = count()
        self._done = count()

    @property
    def will_run(self) -> bool:
        """Whether it runs once all was done that it was asked for."""
        return self._asked[-1][1] if self._asked else self._runs

    def ask(self, runs: bool) -> None:
        self._asked.append((next(self._numbers), runs))

    def answer(self, runs: bool, done: bool) -> None:
        """It did, or did not do, the next of what it was asked for."""
        one = next(self._done), runs
        # What somebody else did may have been taken for its echo.
        if not done and one in self._asked:
            self._asked.remove(one)

    def tell(self, runs: bool) -> bool:
        """It does or does not run now; whether that was its own doing."""
        self._runs = runs
        if self._asked and self._asked[0][1] is runs:
            self._asked.popleft()
            return False
        return True


class LifeCycle:
    """Both sides.  Each method returns what is to be done about what it is told."""

    def __init__(self, context_runs: bool) -> None:
        """QEMU was started with its guest not running yet."""
        self._context = _Side(context_runs)
        self._qemu = _Side(False)
        self._migrating = False

    def begin(self) -> list[Act]:
        """Once both can be asked: the guest runs if its context does."""
        return self._have_qemu(self._context.will_run)

    def qemu_says(self, event: str, status: str = "") -> list[Act]:
        """An event of its monitor; ``status`` is that of MIGRATION."""
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
        """A change of the context."""
        match change:
            case "suspend" | "resume":
                runs = change == "resume"
                if self._context.tell(runs):
                    return self._have_qemu(runs)
            case "power-off" | "removed":
                return [Act.QUIT]
        return []

    def did(self, act: Act, done: bool) -> None:
        """It was done, or could not be done, so that nothing will be told of it.

        To be called for each, in the order in which they were returned.
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
