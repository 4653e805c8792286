"""``python -m bench``: every benchmark, as ratios to its peers.

Figures are medians over rounds in which the contestants take turns; see ``bench/harness.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vsockets.testing import PrivateFabric

from . import (
    amqp,
    connects,
    datagrams,
    drops,
    forward,
    hybrid,
    nfs,
    scale,
    starts,
    streams,
    supervised,
    supervised_floor,
    virtio,
    vmci,
)
from .harness import Series, take_turns

Results = dict[str, dict[str, Series]]


class Goal(NamedTuple):
    """A bound for the ratio of a contestant to a peer."""

    benchmark: str
    peer: str
    more: bool  #: whether more is better
    bound: float
    ours: str = ""  #: the contestant; by default the first one


GOALS = [
    Goal("stream throughput, 64 KiB", "unix", True, 0.95),
    Goal("stream round trip, 64 B", "unix", False, 1.05),
    Goal("datagrams, 64 B", "unix", True, 0.90),
    Goal("connects, 1 client", "tcp", True, 0.60),
    Goal("connects, 4 clients", "tcp", True, 0.90),
    Goal("supervised stream throughput, 64 KiB", "unix", True, 0.95),
    Goal("supervised stream round trip, 64 B", "unix", False, 1.05),
    Goal("supervised connects", "notify", True, 0.5, "trace"),
    Goal("supervised TCP connections of redis", "plain", True, 0.6),
    Goal("supervised TCP connections of redis", "plain", True, 0.6, "trace"),
    Goal("supervised build", "plain", False, 1.05),
    Goal("supervised build", "plain", False, 1.4, "trace"),
    Goal("forward throughput, 64 KiB", "socat", True, 3.0),
    Goal("forward throughput, 64 KiB", "socat 64K", True, 1.2),
    Goal("forward round trip, 64 B", "socat", False, 1.25),
    Goal("forward connects, 1 client", "socat", True, 1.2),
    Goal("forward connects, 4 clients", "socat", True, 2.0),
    Goal("hybrid vsock to the guest, throughput, 64 KiB", "socat", True, 3.0),
    Goal("hybrid vsock to the guest, throughput, 64 KiB", "socat 64K", True, 1.2),
    Goal("hybrid vsock to the guest, round trip, 64 B", "socat", False, 1.25),
    Goal("hybrid vsock from the guest, throughput, 64 KiB", "unix", True, 0.95),
    Goal("VMCI device to a program, no machine", "unix", True, 0.60),
    Goal("VMCI device to the guest, no machine", "unix", True, 0.60),
    Goal("vsockd's time a connect, contexts", "10", False, 1.10),
    Goal("vsockd's time a connect, listeners", "100", False, 1.10),
]


def main() -> int:
    """Run the benchmarks, print tables, and write the figures with ``--json``."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=9, help="rounds of each benchmark (default: %(default)s)"
    )
    parser.add_argument(
        "--only", default="", help="run only benchmarks whose name contains this text"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to this file")
    arguments = parser.parse_args()
    console = Console()
    results: Results = {}
    with Progress(console=console, transient=True) as progress:
        for name, run in _benchmarks(arguments.rounds).items():
            if arguments.only in name:
                task = progress.add_task(name, total=None)
                results[name] = run(partial(progress.advance, task))
                progress.remove_task(task)
    for name, series in results.items():
        console.print(_table(name, series))
    if arguments.json:
        figures = {
            name: {one.name: {"unit": one.unit, "values": one.values} for one in series.values()}
            for name, series in results.items()
        }
        arguments.json.write_text(json.dumps(figures, indent=1))
    missed = [one for one in GOALS if one.benchmark in results and not _is_met(results, one)]
    for goal in missed:
        words = f"{'at least' if goal.more else 'at most'} {goal.bound} of {goal.peer}"
        console.print(f"missed: {goal.benchmark}: {goal.ours} {words}")
    return 1 if missed else 0


Tick = Callable[[], None]
Benchmark = Callable[[Tick], dict[str, Series]]


def _benchmarks(rounds: int) -> dict[str, Benchmark]:
    return {
        **_device_benchmarks(rounds),
        **_fabric_benchmarks(rounds),
        **_supervised_benchmarks(rounds),
        **_start_benchmarks(rounds),
        **(_forward_benchmarks(rounds) if forward.available() else {}),
        **(_amqp_benchmarks(rounds) if amqp.available() else {}),
        **(_nfs_benchmarks(rounds) if nfs.available() else {}),
    }


def _device_benchmarks(rounds: int) -> dict[str, Benchmark]:
    def device(throughput: Callable[[int, bool], float], to_guest: bool) -> Benchmark:
        def run(tick: Tick) -> dict[str, Series]:
            contestants = {
                "device": lambda: throughput(1 << 29, to_guest),
                "unix": lambda: vmci.unix(1 << 29),
            }
            return take_turns(contestants, "MB/s", rounds, tick)

        return run

    def virtio_cost(tick: Tick) -> dict[str, Series]:
        contestants = {
            "device": lambda: virtio.cost(1 << 27),
            "simulated driver": lambda: virtio.cost(1 << 27, of_driver=True),
        }
        return take_turns(contestants, "ms", rounds, tick)

    def vmci_connect_cost(tick: Tick) -> dict[str, Series]:
        return take_turns({"device": lambda: vmci.connect_cost(1000)}, "us", rounds, tick)

    def handed_off(tick: Tick) -> dict[str, Series]:
        with hybrid.running() as stage:
            contestants = {
                "hybrid": lambda: streams.throughput(stage.from_guest(), 4000),
                "unix": lambda: streams.throughput(streams.unix(), 4000),
            }
            return take_turns(contestants, "MB/s", rounds, tick)

    return {
        "VMCI device to a program, no machine": device(vmci.throughput, False),
        "VMCI device to the guest, no machine": device(vmci.throughput, True),
        "virtio device to a program, no machine": device(virtio.throughput, False),
        "virtio device to the guest, no machine": device(virtio.throughput, True),
        "virtio device to the guest, processor time a GB": virtio_cost,
        "VMCI device, processor time a connect": vmci_connect_cost,
        "hybrid vsock from the guest, throughput, 64 KiB": handed_off,
    }


def _playing(rounds: int) -> Benchmark:
    def run(tick: Tick) -> dict[str, Series]:
        with (
            tempfile.TemporaryDirectory(prefix="vsock-", dir="/tmp") as folder,
            PrivateFabric(log_level="warning") as fabric,
        ):
            machine = fabric.played("firecracker")
            guest = fabric.guest(hybrid=f"{folder}/v")
            contestants = {
                "played": lambda: connects.hybrid(machine.socket, machine.context, 500, 1),
                "hybrid": lambda: connects.hybrid(f"{folder}/v", guest, 500, 1),
                "vsock": lambda: connects.vsock(guest, fabric.host, 500, 1),
            }
            return take_turns(contestants, "/s", rounds, tick)

    return run


def _fabric_benchmarks(rounds: int) -> dict[str, Benchmark]:
    def stream(measure: Callable[..., float], count: int, unit: str) -> Benchmark:
        def run(tick: Tick) -> dict[str, Series]:
            with PrivateFabric() as fabric:
                guest = fabric.guest()
                contestants = {
                    "vsock": lambda: measure(streams.vsock(fabric.host, guest), count),
                    "unix": lambda: measure(streams.unix(), count),
                    "tcp": lambda: measure(streams.tcp(), count),
                }
                return take_turns(contestants, unit, rounds, tick)

        return run

    def datagram(tick: Tick) -> dict[str, Series]:
        with PrivateFabric() as fabric:
            guest = fabric.guest()
            contestants = {
                "vsock": lambda: datagrams.vsock(fabric.host, guest, 40_000),
                "unix": lambda: datagrams.unix(40_000),
                "udp": lambda: datagrams.udp(40_000),
            }
            return take_turns(contestants, "/s", rounds, tick)

    def connecting(clients: int, count: int) -> Benchmark:
        def run(tick: Tick) -> dict[str, Series]:
            with PrivateFabric(log_level="warning") as fabric:
                guest = fabric.guest()
                contestants = {
                    "vsock": lambda: connects.vsock(fabric.host, guest, count, clients),
                    "bare broker": lambda: connects.bare(count, clients),
                    "tcp": lambda: connects.tcp(count, clients),
                }
                return take_turns(contestants, "/s", rounds, tick)

        return run

    def connects_cost(tick: Tick) -> dict[str, Series]:
        with PrivateFabric(log_level="warning") as fabric:
            ours = partial(connects.vsock, fabric.host, fabric.guest())
            contestants = {
                "vsock": lambda: connects.cost(ours, 2000, 4, fabric.pid),
                "bare broker": lambda: connects.cost(connects.bare, 2000, 4),
                "tcp": lambda: connects.cost(connects.tcp, 2000, 4),
            }
            return take_turns(contestants, "us", rounds, tick)

    def growing(few: tuple[str, int, int], lots: tuple[str, int, int]) -> Benchmark:
        def run(tick: Tick) -> dict[str, Series]:
            with (
                scale.many(few[1], few[2], tick) as with_few,
                scale.many(lots[1], lots[2], tick) as with_lots,
            ):
                return take_turns({lots[0]: with_lots, few[0]: with_few}, "us", rounds, tick)

        return run

    def dropping(tick: Tick) -> dict[str, Series]:
        with (
            drops.suspends(1) as one,
            drops.suspends(100) as hundred,
            drops.suspends(1000) as thousand,
        ):
            contestants = {"1 stream": one, "100 streams": hundred, "1,000 streams": thousand}
            return take_turns(contestants, "ms", rounds, tick)

    many_contexts = scale.most(10_000, 2)
    many_listeners = scale.most(20_000, 1)

    return {
        "stream throughput, 64 KiB": stream(streams.throughput, 4000, "MB/s"),
        "stream round trip, 64 B": stream(streams.round_trip, 15_000, "us"),
        "datagrams, 64 B": datagram,
        "connects, 1 client": connecting(1, 3000),
        "connects, 4 clients": connecting(4, 2000),
        "connects to a played Firecracker, 1 client": _playing(rounds),
        "processor time a connect, 4 clients": connects_cost,
        "suspend until the last end is interrupted": dropping,
        "vsockd's time a connect, contexts": growing(
            ("10", 10, 1), (f"{many_contexts:,}", many_contexts, 1)
        ),
        "vsockd's time a connect, listeners": growing(
            ("100", 1, 100), (f"{many_listeners:,}", 1, many_listeners)
        ),
    }


def _supervised_benchmarks(rounds: int) -> dict[str, Benchmark]:
    def supervising(measure: str, count: int, unit: str) -> Benchmark:
        def run(tick: Tick) -> dict[str, Series]:
            with PrivateFabric(log_level="warning") as fabric:
                contestants: dict[str, Callable[[], float]] = {
                    name: partial(supervised.program, fabric, name, measure, count)
                    for name in (*supervised.INTERCEPTORS, "unix", "tcp")
                }
                return take_turns(contestants, unit, rounds, tick)

        return run

    def supervisors(tick: Tick) -> dict[str, Series]:
        with PrivateFabric(log_level="warning") as fabric:
            contestants: dict[str, Callable[[], float]] = {
                name: partial(supervised.program, fabric, name, "supervisor", 1000)
                for name in supervised.INTERCEPTORS
            }
            floor = partial(supervised_floor.cost, 20_000)
            return take_turns({**contestants, "one bare call": floor}, "us", rounds, tick)

    def bystander(measure: Callable[[PrivateFabric, str], float], unit: str = "s") -> Benchmark:
        def run(tick: Tick) -> dict[str, Series]:
            with PrivateFabric() as fabric:
                contestants: dict[str, Callable[[], float]] = {
                    name: partial(measure, fabric, name)
                    for name in (*supervised.INTERCEPTORS, "plain")
                }
                return take_turns(contestants, unit, rounds, tick)

        return run

    return {
        "supervised stream throughput, 64 KiB": supervising("throughput", 8000, "MB/s"),
        "supervised stream round trip, 64 B": supervising("round trip", 15_000, "us"),
        "supervised connects": supervising("connects", 1500, "/s"),
        "supervisor's time a connection": supervisors,
        "supervised TCP connections of redis": bystander(supervised.churn, "/s"),
        "supervised build": bystander(supervised.build),
        "supervised starts of Python": bystander(supervised.starts),
    }


def _start_benchmarks(rounds: int) -> dict[str, Benchmark]:
    def run(tick: Tick) -> dict[str, Series]:
        with starts.installed() as programs:
            contestants: dict[str, Callable[[], float]] = {
                name: partial(programs.start, *command) for name, command in starts.PROGRAMS.items()
            }
            return take_turns(contestants, "ms", 3 * rounds, tick)

    return {"starts of programs, installed": run}


def _forward_benchmarks(rounds: int) -> dict[str, Benchmark]:
    def forwarding(measure: Callable[..., float], count: int, unit: str) -> Benchmark:
        def run(tick: Tick) -> dict[str, Series]:
            with forward.running() as (forwarders, names):
                contestants: dict[str, Callable[[], float]] = {
                    name: partial(lambda name: measure(forwarders.pair(name), count), name)
                    for name in names
                }
                return take_turns(contestants, unit, rounds, tick)

        return run

    def forwarded_connects(clients: int, count: int) -> Benchmark:
        def run(tick: Tick) -> dict[str, Series]:
            with forward.running() as (forwarders, names):
                contestants: dict[str, Callable[[], float]] = {
                    name: partial(forwarders.connects, name, count, clients) for name in names
                }
                return take_turns(contestants, "/s", rounds, tick)

        return run

    def hybrid_beside_socat(measure: Callable[..., float], count: int, unit: str) -> Benchmark:
        def run(tick: Tick) -> dict[str, Series]:
            with hybrid.running() as stage, forward.running() as (forwarders, _):
                contestants: dict[str, Callable[[], float]] = {
                    "hybrid": lambda: measure(stage.to_guest(), count)
                }
                for name in forward.SOCAT_BLOCKS:
                    contestants[name] = partial(
                        lambda name: measure(forwarders.pair(name), count), name
                    )
                return take_turns(contestants, unit, rounds, tick)

        return run

    return {
        "hybrid vsock to the guest, throughput, 64 KiB": hybrid_beside_socat(
            streams.throughput, 4000, "MB/s"
        ),
        "hybrid vsock to the guest, round trip, 64 B": hybrid_beside_socat(
            streams.round_trip, 5000, "us"
        ),
        "forward throughput, 64 KiB": forwarding(streams.throughput, 4000, "MB/s"),
        "forward round trip, 64 B": forwarding(streams.round_trip, 5000, "us"),
        "forward connects, 1 client": forwarded_connects(1, 300),
        "forward connects, 4 clients": forwarded_connects(4, 150),
    }


def _amqp_benchmarks(rounds: int) -> dict[str, Benchmark]:
    def messaging(measure: Callable[..., float], *size: int, unit: str) -> Benchmark:
        def run(tick: Tick) -> dict[str, Series]:
            with amqp.running() as ports:
                contestants: dict[str, Callable[[], float]] = {
                    name: partial(measure, port, *size) for name, port in ports.items()
                }
                return take_turns(contestants, unit, rounds, tick)

        return run

    return {
        "amqp publishing, 1 KiB": messaging(amqp.publishing, 5000, 1024, unit="MB/s"),
        "amqp publishing, 64 KiB": messaging(amqp.publishing, 500, 65_536, unit="MB/s"),
        "amqp consuming, 1 KiB": messaging(amqp.fetching, 5000, 1024, unit="MB/s"),
        "amqp consuming, 64 KiB": messaging(amqp.fetching, 500, 65_536, unit="MB/s"),
        "amqp confirmed one by one, 64 B": messaging(amqp.confirming, 300, unit="us"),
    }


def _nfs_benchmarks(rounds: int) -> dict[str, Benchmark]:
    def storing(measure: Callable[[Path, int], float], count: int, unit: str) -> Benchmark:
        def run(tick: Tick) -> dict[str, Series]:
            with nfs.mounted() as folders:
                contestants: dict[str, Callable[[], float]] = {
                    name: partial(measure, folder, count) for name, folder in folders.items()
                }
                return take_turns(contestants, unit, rounds, tick)

        return run

    return {
        "nfs writing, 32 MiB": storing(nfs.writing, 32, "MB/s"),
        "nfs reading, 32 MiB": storing(nfs.reading, 32, "MB/s"),
        "nfs making and removing files of 4 KiB": storing(nfs.creating, 200, "/s"),
    }


def _is_met(results: Results, goal: Goal) -> bool:
    series = results[goal.benchmark]
    ours = series[goal.ours or next(iter(series))]
    ratio = ours.ratio_to(series[goal.peer])
    return ratio >= goal.bound if goal.more else ratio <= goal.bound


def _table(name: str, series: dict[str, Series]) -> Table:
    ours = next(iter(series.values()))
    goals = {goal.ours or goal.peer: goal for goal in GOALS if goal.benchmark == name}
    longest = max(one.median for one in series.values())
    table = Table(title=name, title_justify="left", width=78)
    table.add_column("")
    table.add_column("median", justify="right")
    table.add_column("slowest", justify="right")
    table.add_column(f"{ours.name} : peer", justify="right")
    table.add_column("goal")
    table.add_column("", width=14)
    for one in series.values():
        goal = goals.get(one.name)
        said, ratio = "", "" if one is ours else f"{ours.ratio_to(one):.2f}"
        if goal is not None:
            said = f"{'>=' if goal.more else '<='} {goal.bound}"
            if goal.ours:
                said += f" of {goal.peer}: {one.ratio_to(series[goal.peer]):.2f}"
        table.add_row(
            one.name,
            f"{one.median:,.1f} {one.unit}",
            f"{one.slowest:,.1f}",
            ratio,
            said,
            "█" * max(1, round(14 * one.median / longest)),
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
