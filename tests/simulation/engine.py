"""Histories of a simulated world: generated from a seed, run, and shortened.

A history is a list of steps.  A step is an action's name and a number; the action makes all of its
choices from that number and the state of the world, and does nothing where it has no choice.  So
each part of a history is a history.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

Step = tuple[str, int]


class World:
    """A simulated world: its actions are the methods ``do_NAME``."""

    #: weights of the actions, by name
    actions: ClassVar[dict[str, int]] = {}
    #: the actions that are faults
    faults: ClassVar[frozenset[str]] = frozenset()
    #: one in so many seeds is run, where many seeds are
    every: ClassVar[int] = 1

    def check(self) -> None:
        """Raise AssertionError when an invariant does not hold."""

    def quiesce(self) -> None:
        """Stop faults, let everything proceed, and check that nothing is left or stuck."""

    def patches(self) -> list[tuple[Any, str, Any]]:
        """Return substitutes for names of modules while the world runs: time, and poll()."""
        return []

    def close(self) -> None:
        """Release what the world has of the kernel."""


def generate(world: type[World], seed: int, steps: int) -> list[Step]:
    """Return the history of a seed."""
    chance = random.Random(seed)
    # Each seed prefers other actions: queues fill up only where readers are rare.
    weights = [weight * chance.choice((0, 1, 1, 2, 5)) for weight in world.actions.values()]
    if not any(weights):
        weights = list(world.actions.values())
    names = chance.choices(list(world.actions), weights, k=steps)
    return [(name, chance.getrandbits(32)) for name in names]


class Failure(Exception):
    """A history after which an invariant does not hold."""

    def __init__(self, history: list[Step], error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.history = history
        self.error = error


def run(make: Callable[[], World], seed: int, history: list[Step]) -> None:
    """Run a history in a new world.

    Raises Failure, with the history up to the failing step.
    """
    before = random.getstate()
    random.seed(seed)  # Ports start at a random one
    done = 0
    world = None
    replaced: list[tuple[Any, str, Any]] = []
    try:
        world = make()
        for module, name, value in world.patches():
            replaced.append((module, name, getattr(module, name)))
            setattr(module, name, value)
        for done, (name, number) in enumerate(history, 1):  # noqa: B007 - used after a failure
            getattr(world, f"do_{name}")(random.Random(number))
            world.check()
        world.quiesce()
    except Exception as error:
        raise Failure(history[:done], error) from error
    finally:
        random.setstate(before)
        if world is not None:
            world.close()
        for module, name, value in replaced:
            setattr(module, name, value)


def shorten(make: Callable[[], World], seed: int, history: list[Step]) -> Failure:
    """Return the failure of a history from which no step can be left out (delta debugging)."""

    def attempt(steps: list[Step]) -> Failure | None:
        try:
            run(make, seed, steps)
        except Failure as failure:
            return failure
        return None

    failure = attempt(history)
    assert failure is not None, "the history does not fail"
    size = max(len(failure.history) // 2, 1)
    while True:
        start, before = 0, len(failure.history)
        while start < len(failure.history):
            steps = failure.history
            shorter = attempt(steps[:start] + steps[start + size :])
            if shorter is None:
                start += size
            else:
                failure = shorter
        if size == 1 and len(failure.history) == before:
            return failure
        size = max(size // 2, 1)


def simulate(world: type[World], seed: int, steps: int) -> Counter[str]:
    """Run a seed; return how often each action was taken.

    Raises Failure with the shortest history that still fails.
    """
    history = generate(world, seed, steps)
    try:
        run(world, seed, history)
    except Failure as failure:
        raise shorten(world, seed, failure.history) from None
    return Counter(name for name, _ in history)


def pick(chance: random.Random, values: Any) -> Any:
    """Return one of the values, or None without any."""
    values = list(values)
    return chance.choice(values) if values else None
