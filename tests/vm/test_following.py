"""A machine's life and its context's: what is decided, and that it comes to rest."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vsockets.vm.life_cycle import Act, LifeCycle


def begun(context_runs: bool = True) -> LifeCycle:
    """A machine that runs, or waits for its context."""
    life = LifeCycle(context_runs)
    assert life.begin() == ([Act.CONT] if context_runs else [])
    if context_runs:
        assert life.qemu_says("RESUME") == []
    return life


def test_the_context_follows() -> None:
    life = begun()
    assert life.qemu_says("STOP") == [Act.SUSPEND]
    assert life.vsockd_says("suspend") == []
    assert life.qemu_says("RESUME") == [Act.RESUME]
    assert life.vsockd_says("resume") == []


def test_the_machine_follows() -> None:
    life = begun()
    assert life.vsockd_says("suspend") == [Act.STOP]
    assert life.qemu_says("STOP") == []
    assert life.vsockd_says("resume") == [Act.CONT]
    assert life.qemu_says("RESUME") == []


def test_a_machine_whose_context_is_suspended_waits() -> None:
    assert begun(context_runs=False).vsockd_says("resume") == [Act.CONT]


def test_a_reset() -> None:
    life = begun()
    assert life.qemu_says("RESET") == [Act.RESET]
    assert life.vsockd_says("reset") == []


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled"])
def test_a_migration_drops_connections_and_does_not_suspend(end: str) -> None:
    life = begun()
    for status in ("setup", "active"):
        assert life.qemu_says("MIGRATION", status) == []
    assert life.qemu_says("STOP") == [Act.MIGRATE]
    assert life.vsockd_says("migrate") == []
    assert life.qemu_says("MIGRATION", end) == []
    if end != "completed":
        assert life.qemu_says("RESUME") == []
        assert life.qemu_says("STOP") == [Act.SUSPEND]


@pytest.mark.parametrize("change", ["power-off", "removed"])
def test_what_ends_the_context_ends_the_machine(change: str) -> None:
    assert begun().vsockd_says(change) == [Act.QUIT]


def test_what_means_nothing() -> None:
    life = begun()
    for change in ("ft-on", "ft-off", "power-on", "added"):
        assert life.vsockd_says(change) == []
    assert life.qemu_says("SHUTDOWN") == []


def test_what_qemu_refuses_is_not_waited_for() -> None:
    life = begun()
    assert life.vsockd_says("suspend") == [Act.STOP]
    life.did(Act.CONT, True)  # that of the beginning
    life.did(Act.STOP, False)
    assert life.vsockd_says("resume") == []  # it runs still


class World:
    """Both sides as they are, with what is on its way between them and the life cycle."""

    def __init__(self) -> None:
        self.life = LifeCycle(True)
        self.runs = {"qemu": False, "context": True}
        self.told: dict[str, deque[bool]] = {"qemu": deque(), "context": deque()}
        self.acts = deque(self.life.begin())
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
                self.acts += self.life.qemu_says("RESUME" if runs else "STOP")
            else:
                self.acts += self.life.vsockd_says("resume" if runs else "suspend")

    def act(self) -> None:
        if self.acts:
            self.done += 1
            act = self.acts.popleft()
            side = "qemu" if act.is_qemus else "context"
            # What it does already is done without an event; somebody else's has told of it.
            self.change(side, act in (Act.CONT, Act.RESUME))
            self.life.did(act, True)


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
