"""``python -m simulation [--seeds N]``; see docs/internals/simulation.md."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from time import monotonic

from .broker_world import BrokerWorld
from .datagram_world import DatagramWorld
from .engine import Failure, World, simulate
from .fabric_world import FabricWorld
from .killed_world import KilledWorld
from .named_world import NamedWorld
from .virtio_device_world import VirtioDeviceWorld
from .virtio_world import VirtioWorld
from .vmci_world import VmciWorld

#: The worlds; a seed is run in each.
WORLDS: tuple[type[World], ...] = (
    FabricWorld,
    VirtioWorld,
    VirtioDeviceWorld,
    VmciWorld,
    BrokerWorld,
    DatagramWorld,
    NamedWorld,
    KilledWorld,
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="number of seeds (default: 1000)")
    parser.add_argument("--seed", type=int, help="run this seed alone")
    parser.add_argument("--steps", type=int, default=300, help="steps of a seed (default: 300)")
    names = [world.__name__ for world in WORLDS]
    parser.add_argument("--world", choices=names, help="run this world alone (default: all)")
    options = parser.parse_args(arguments)
    seeds = range(options.seeds) if options.seed is None else [options.seed]
    worlds = [world for world in WORLDS if options.world in (None, world.__name__)]
    started, taken, faults = monotonic(), Counter[str](), 0
    for seed in seeds:
        for world in worlds:
            if len(worlds) > 1 and seed % world.every:
                continue
            try:
                done = simulate(world, seed, options.steps)
            except Failure as failure:
                print(f"{world.__name__}, seed {seed}: {failure}")
                print(f"the shortest history that fails, {len(failure.history)} steps:")
                for name, number in failure.history:
                    print(f"    {name:<12} {number}")
                return 1
            taken += done
            faults += sum(done[name] for name in world.faults)
    seconds = monotonic() - started
    print(
        f"{len(seeds)} seeds, {taken.total()} steps, {faults} faults in {seconds:.1f} s: no failure"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
