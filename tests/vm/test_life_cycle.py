"""The synchronisation of a machine's life cycle with its context's, and its convergence."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vsockets.vm.life_cycle import LifeCycle, LifeCycleAction


def started(context_runs: bool = True) -> LifeCycle:
    """Return the life cycle of a machine that runs, or waits for its context."""
    life = LifeCycle(context_runs)
    assert life.start() == ([LifeCycleAction.CONT] if context_runs else [])
    if context_runs:
        assert life.on_qemu_event("RESUME") == []
    return life


def test_machine_changes_are_applied_to_the_context() -> None:
    life = started()
    assert life.on_qemu_event("STOP") == [LifeCycleAction.SUSPEND]
    assert life.on_context_event("suspend") == []
    assert life.on_qemu_event("RESUME") == [LifeCycleAction.RESUME]
    assert life.on_context_event("resume") == []


def test_context_changes_are_applied_to_the_machine() -> None:
    life = started()
    assert life.on_context_event("suspend") == [LifeCycleAction.STOP]
    assert life.on_qemu_event("STOP") == []
    assert life.on_context_event("resume") == [LifeCycleAction.CONT]
    assert life.on_qemu_event("RESUME") == []


def test_machine_with_a_suspended_context_waits() -> None:
    assert started(context_runs=False).on_context_event("resume") == [LifeCycleAction.CONT]


def test_reset_is_applied_to_the_context() -> None:
    life = started()
    assert life.on_qemu_event("RESET") == [LifeCycleAction.RESET]
    assert life.on_context_event("reset") == []


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled"])
def test_migration_drops_connections_without_suspend(end: str) -> None:
    life = started()
    for status in ("setup", "active"):
        assert life.on_qemu_event("MIGRATION", status) == []
    assert life.on_qemu_event("STOP") == [LifeCycleAction.MIGRATE]
    assert life.on_context_event("migrate") == []
    assert life.on_qemu_event("MIGRATION", end) == []
    if end != "completed":
        assert life.on_qemu_event("RESUME") == []
        assert life.on_qemu_event("STOP") == [LifeCycleAction.SUSPEND]


@pytest.mark.parametrize("change", ["power-off", "removed"])
def test_end_of_the_context_ends_the_machine(change: str) -> None:
    assert started().on_context_event(change) == [LifeCycleAction.QUIT]


def test_other_events_are_ignored() -> None:
    life = started()
    for change in ("ft-on", "ft-off", "power-on", "added"):
        assert life.on_context_event(change) == []
    assert life.on_qemu_event("SHUTDOWN") == []


def test_refused_request_is_not_outstanding() -> None:
    life = started()
    assert life.on_context_event("suspend") == [LifeCycleAction.STOP]
    life.completed(LifeCycleAction.CONT, True)  # the request of the start
    life.completed(LifeCycleAction.STOP, False)
    assert life.on_context_event("resume") == []  # it still runs


class Simulation:
    """Both sides, with the events and actions that are in flight between them."""

    def __init__(self) -> None:
        self.life = LifeCycle(True)
        self.runs = {"qemu": False, "context": True}
        self.events: dict[str, deque[bool]] = {"qemu": deque(), "context": deque()}
        self.actions = deque(self.life.start())
        self.done = 0

    def change(self, side: str, runs: bool) -> bool:
        """Make a side run or stop; return whether that is a change."""
        if self.runs[side] is runs:
            return False
        self.runs[side] = runs
        self.events[side].append(runs)
        return True

    def deliver(self, side: str) -> None:
        if self.events[side]:
            runs = self.events[side].popleft()
            if side == "qemu":
                self.actions += self.life.on_qemu_event("RESUME" if runs else "STOP")
            else:
                self.actions += self.life.on_context_event("resume" if runs else "suspend")

    def act(self) -> None:
        if self.actions:
            self.done += 1
            action = self.actions.popleft()
            side = "qemu" if action.is_for_qemu else "context"
            # An action that changes nothing causes no event; the change that preceded it has.
            self.change(side, action in (LifeCycleAction.CONT, LifeCycleAction.RESUME))
            self.life.completed(action, True)


STEPS = ["act", "deliver qemu", "deliver context"]
STEPS += ["qemu stops", "qemu runs", "context stops", "context runs"]


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.sampled_from(STEPS), max_size=60))
def test_both_sides_converge_after_any_events(steps: list[str]) -> None:
    simulation = Simulation()
    changes = 0
    for step in steps:
        first, _, rest = step.partition(" ")
        if first == "act":
            simulation.act()
        elif first == "deliver":
            simulation.deliver(rest)
        else:
            changes += simulation.change(first, rest == "runs")
    while simulation.actions or any(simulation.events.values()):
        simulation.deliver("qemu")
        simulation.deliver("context")
        simulation.act()
        # One action for each change by others, and one for the start.
        assert simulation.done <= changes + 1
    assert simulation.runs["qemu"] is simulation.runs["context"]
