"""``vsock demo``: the fabric at work, with real files and real processes."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ..groups import group
from ..options import json_option
from ..output import Column, print_json, print_table

if TYPE_CHECKING:
    from .stage import Program, Stage

#: Ports of the demo's services.
FILES, SOURCES, PRIVATE = 5000, 5001, 7000

#: Measured transfers of each kind, in turns.
TURNS = 5


class Step(NamedTuple):
    """One row of the report: the action, its participants, and the result."""

    step: str
    who: str
    ok: bool
    result: str


@group("demo", invoke_without_command=True)
@json_option
@click.pass_context
def demo(context: click.Context, as_json: bool) -> None:
    """Show the fabric at work between a host and two guests.

    In a private fabric, removed at the end, files go from a guest to the host, datagrams from
    two guests, one guest is isolated from the other, and the first transfer is repeated over TCP.
    The subcommands amqp and nfs show use cases of VMware's guide.  The exit status is 1 if a step
    fails.
    """
    if context.invoked_subcommand is None:
        perform(play, as_json)


@demo.command("amqp")
@json_option
def amqp(as_json: bool) -> None:
    """Show two guests that exchange messages through RabbitMQ (figure 1-1 of VMware's guide).

    In a private fabric and with a private RabbitMQ, messages go from each guest to the other,
    by stock clients and the three proxies; one proxy is killed in between.  The exit status is 1
    if a step fails.  Needs an installed rabbitmq-server, and starts its own.
    """
    from .amqp import play

    perform(play, as_json)


@demo.command("nfs")
@json_option
def nfs(as_json: bool) -> None:
    """Show guests that share a folder of the host (figure 1-2 of VMware's guide).

    In a private fabric two guests mount a folder of the host by NFS over datagrams; the server is
    killed while one of them writes; the other reads the same file, and a third guest is refused.
    The exit status is 1 if a step fails.  Needs pyfuse3, fusermount3 and /dev/fuse.
    """
    from .nfs import play

    perform(play, as_json)


#: A demo: called with whether to show progress, it returns its steps and measurements.
Play = Callable[["Stage", bool], tuple[list[Step], dict[str, Any]]]


def perform(play: Play, as_json: bool) -> None:
    """Run a demo, with progress on standard error, and print its report."""
    from .stage import Stage

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with Stage() as stage:
        steps, throughput = play(stage, not as_json)
    ok = all(step.ok for step in steps)
    if as_json:
        print_json({"ok": ok, "steps": [s._asdict() for s in steps], "throughput": throughput})
    else:
        columns = [Column("STEP"), Column("WHO"), Column(""), Column("RESULT", whole=False)]
        print_table(columns, ((s.step, s.who, "ok" if s.ok else "FAILED", s.result) for s in steps))
    if not ok:
        raise click.exceptions.Exit(1)


def play(stage: Stage, show_progress: bool) -> tuple[list[Step], dict[str, Any]]:
    """Run the demo of streams, datagrams and isolation (chapters 3 to 5 of the guide)."""
    host, guest, other = stage.fabric.host, stage.fabric.guest(), stage.fabric.guest()
    # All start at once: most of the time is Python's start-up.
    receiver = stage.serve(host, "receive_files", host.cid, FILES)
    tcp_receiver = stage.serve(host, "receive_files", "127.0.0.1", 0)
    sources = stage.serve(host, "report_sources", SOURCES)
    listener = stage.serve(other, "accept_clients", PRIVATE)
    sender = stage.start(guest, "send_files", host.cid, FILES)
    for service in (receiver, sources, listener):
        service.read()
    tcp_sender = stage.start(guest, "send_files", *tcp_receiver.read()["ready"])

    steps = [_send_files(sender, guest.cid, show_progress)]
    for asking in (guest, other):
        asked = stage.start(asking, "ask_for_source", host.cid, SOURCES).read()
        steps.append(judge_datagrams(asked, asking.cid))
    refused = stage.start(guest, "try_to_connect", other.cid, PRIVATE).read()["errno"]
    steps.append(judge_refusal(refused, guest.cid, other.cid))
    allowed = stage.start(host, "try_to_connect", other.cid, PRIVATE).read()["errno"]
    noted = listener.read() if allowed == 0 else None
    steps.append(judge_permission(allowed, noted, other.cid))
    measured = _measure(sender, tcp_sender)
    steps += judge_throughput(measured)
    return steps, measured


def _send_files(sender: Program, cid: int, show_progress: bool) -> Step:
    offered = sender.read()
    sender.write("loudly")
    with progress("files to the host", offered["bytes"], show_progress) as advance:
        while "seconds" not in (said := sender.read()):
            advance(said["sent"])
    # Each side has computed the digest from its own bytes and reports the client's address.
    ok = (
        said["intact"]
        and said["bytes"] == offered["bytes"]
        and said["sha256"] == offered["sha256"]
        and said["client"] == said["us"]
        and said["us"][0] == cid
    )
    amount = f"{offered['files']} files, {offered['bytes'] / 1e6:.0f} MB"
    digest = f"sha256 {said['sha256'][:12]}… at both ends"
    return Step("files over a stream", f"guest {cid} to host", ok, f"{amount}, {digest}")


def judge_datagrams(asked: dict[str, Any], cid: int) -> Step:
    """Return the report's step that compares a datagram's source as received with the true one."""
    source, us = asked["answer"]["source"], asked["us"]
    ok = source == us and us[0] == cid and asked["service"] == [2, SOURCES]
    result = "the host received from {}:{}".format(*source)
    result += ", the true source" if ok else ", but the true source is {}:{}".format(*us)
    return Step("datagrams", f"guest {cid} and host", ok, result)


def judge_refusal(code: int, cid: int, other: int) -> Step:
    """Return the report's step about a connect to another guest; ``code`` is its errno, or 0."""
    result = f"refused: {errno.errorcode.get(code, code)} ({os.strerror(code)})"
    ok = code == errno.EHOSTUNREACH
    return Step(
        "guest to guest", f"guest {cid} to guest {other}", ok, result if code else "connected!"
    )


def judge_permission(code: int, noted: dict[str, Any] | None, cid: int) -> Step:
    """Return the report's step about a connect from the host to guest ``cid``.

    ``code`` is its errno, or 0; ``noted`` is the guest's report of the accepted client.
    """
    ok = code == 0 and noted is not None and noted["client"][0] == 2
    result = (
        "the same listener accepts the host" if ok else f"{os.strerror(code)}, accepted {noted}"
    )
    return Step("host to guest", f"host to guest {cid}", ok, result)


def _measure(sender: Program, tcp_sender: Program) -> dict[str, Any]:
    """Measure the same transfer over vSockets and over TCP in turns, in 1e6 bytes per second."""
    size = tcp_sender.read()["bytes"]
    rates: dict[str, list[float]] = {"vsock": [], "tcp": []}
    intact = True
    for turn in range(TURNS + 1):
        for kind, program in (("tcp", tcp_sender), ("vsock", sender)):
            program.write("quietly")
            receipt = program.read()
            intact = intact and receipt["intact"] and receipt["bytes"] == size
            if turn > 0:  # the first one warms the memory up
                rates[kind].append(size / receipt["seconds"] / 1e6)
    import statistics

    medians = {kind: statistics.median(values) for kind, values in rates.items()}
    return {
        "intact": intact,
        "bytes": size,
        "MB_per_s": {kind: [round(rate) for rate in values] for kind, values in rates.items()},
        "median_MB_per_s": {kind: round(rate) for kind, rate in medians.items()},
        "ratio": round(medians["vsock"] / medians["tcp"], 2),
    }


def judge_throughput(measured: dict[str, Any]) -> list[Step]:
    """Return the report's steps about the measured transfers, over TCP and over vSockets."""
    median, intact = measured["median_MB_per_s"], measured["intact"]
    runs = f"median of {TURNS}"
    return [
        Step("the same over TCP", "127.0.0.1", intact, f"{median['tcp']} MB/s, {runs}"),
        Step(
            "over vSockets",
            "guest to host",
            intact,
            f"{median['vsock']} MB/s, {runs}: {measured['ratio']} times TCP",
        ),
    ]


@contextlib.contextmanager
def progress(
    what: str, total: int, show: bool, column: str = "TaskProgressColumn"
) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on standard error; yield a function that sets the amount done so far.

    ``column`` is the class of ``rich.progress`` that writes the amount.
    """
    import rich.progress as rich
    from rich.console import Console

    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), getattr(rich, column)())
    with rich.Progress(
        *columns, console=Console(stderr=True), disable=not show, transient=True
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
