"""A machine's life and its context's: what is decided, and that it comes to rest."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vsockets.vm.life_cycle import Action, LifeCycle


def begun(context_runs: bool = True) -> LifeCycle:
    """A machine that runs, or waits for its context."""
    life = LifeCycle(context_runs)
    assert life.start() == ([Action.CONT] if context_runs else [])
    if context_runs:
        assert life.on_qemu_event("RESUME") == []
    return life


def test_the_context_follows() -> None:
    life = begun()
    assert life.on_qemu_event("STOP") == [Action.SUSPEND]
    assert life.on_context_event("suspend") == []
    assert life.on_qemu_event("RESUME") == [Action.RESUME]
    assert life.on_context_event("resume") == []


def test_the_machine_follows() -> None:
    life = begun()
    assert life.on_context_event("suspend") == [Action.STOP]
    assert life.on_qemu_event("STOP") == []
    assert life.on_context_event("resume") == [Action.CONT]
    assert life.on_qemu_event("RESUME") == []


def test_a_machine_whose_context_is_suspended_waits() -> None:
    assert begun(context_runs=False).on_context_event("resume") == [Action.CONT]


def test_a_reset() -> None:
    life = begun()
    assert life.on_qemu_event("RESET") == [Action.RESET]
    assert life.on_context_event("reset") == []


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled"])
def test_a_migration_drops_connections_and_does_not_suspend(end: str) -> None:
    life = begun()
    for status in ("setup", "active"):
        assert life.on_qemu_event("MIGRATION", status) == []
    assert life.on_qemu_event("STOP") == [Action.MIGRATE]
    assert life.on_context_event("migrate") == []
    assert life.on_qemu_event("MIGRATION", end) == []
    if end != "completed":
        assert life.on_qemu_event("RESUME") == []
        assert life.on_qemu_event("STOP") == [Action.SUSPEND]


@pytest.mark.parametrize("change", ["power-off", "removed"])
def test_what_ends_the_context_ends_the_machine(change: str) -> None:
    assert begun().on_context_event(change) == [Action.QUIT]


def test_what_means_nothing() -> None:
    life = begun()
    for change in ("ft-on", "ft-off", "power-on", "added"):
        assert life.on_context_event(change) == []
    assert life.on_qemu_event("SHUTDOWN") == []


def test_what_qemu_refuses_is_not_waited_for() -> None:
    life = begun()
    assert life.on_context_event("suspend") == [Action.STOP]
    life.completed(Action.CONT, True)  # that of the beginning
    life.completed(Action.STOP, False)
    assert life.on_context_event("resume") == []  # it runs still


class World:
    """Both sides as they are, with what is on its way between them and the life cycle."""

    def __init__(self) -> None:
        self.life = LifeCycle(True)
        self.runs = {"qemu": False, "context": True}
        self.told: dict[str, deque[bool]] = {"qemu": deque(), "context": deque()}
        self.acts = deque(self.life.start())
        self.done = 0

    def change(self, side: str, runs: bool) -> bool:
        """Somebody has a side run or not; whether that changed anything."""
        if self.runs[side] is runs:
            return False
        self.runs[side] = runs
        self.told[side].append(runs)
        return True

    def tell(self, side: str) -> None:
        if self.told[side]:
            runs = self.told[side].popleft()
            if side == "qemu":
                self.acts += self.life.on_qemu_event("RESUME" if runs else "STOP")
            else:
                self.acts += self.life.on_context_event("resume" if runs else "suspend")

    def act(self) -> None:
        if self.acts:
            self.done += 1
            act = self.acts.popleft()
            side = "qemu" if act.is_for_qemu else "context"
            # What it does already is done without an event; somebody else's has told of it.
            self.change(side, act in (Action.CONT, Action.RESUME))
            self.life.completed(act, True)


STEPS = ["act", "tell qemu", "tell context"]
STEPS += ["qemu stops", "qemu runs", "context stops", "context runs"]


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.sampled_from(STEPS), max_size=60))
def test_whatever_happens_when_both_come_to_rest_in_the_same_state(steps: list[str]) -> None:
    world = World()
    changes = 0
    for step in steps:
        first, _, rest = step.partition(" ")
        if first == "act":
            world.act()
        elif first == "tell":
            world.tell(rest)
        else:
            changes += world.change(first, rest == "runs")
    while world.acts or any(world.told.values()):
        world.tell("qemu")
        world.tell("context")
        world.act()
        # Nothing is done more than once for each thing that somebody did, and at the beginning.
        assert world.done <= changes + 1
    assert world.runs["qemu"] is world.runs["context"]
