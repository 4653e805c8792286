"""``vsock demo``: what the fabric is for, done with real files and real processes."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from ..options import JsonOption
from ..output import Column, print_json, print_table

if TYPE_CHECKING:
    from .stage import Program, Stage

#: Ports of the demo's services.
FILES, SOURCES, PRIVATE = 5000, 5001, 7000

#: Transfers that are measured, of each kind, in turns.
TURNS = 5


class Step(NamedTuple):
    """What was done, between whom, and what came of it."""

    step: str
    who: str
    ok: bool
    result: str


app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def choose(context: typer.Context, as_json: JsonOption = False) -> None:
    """Show a host and two guests at work; amqp and nfs show the guide's use cases.

    In a private fabric, which is gone afterwards, files go from a guest to the host, datagrams
    from two guests, a guest is kept from another one, and the first transfer is made over TCP,
    too.  Exits with 1 if anything went wrong.
    """
    if context.invoked_subcommand is None:
        demo(as_json)


@app.command("amqp")
def amqp(as_json: JsonOption = False) -> None:
    """Show two guests that talk by RabbitMQ (the guide's figure 1-1).

    In a private fabric and with a private RabbitMQ, messages go from each guest to the other,
    by stock clients and the three proxies; one proxy is killed in between.  Exits with 1 if
    anything went wrong.  Needs rabbitmq-server to be installed, and runs its own.
    """
    from .amqp import play

    _perform(play, as_json)


@app.command("nfs")
def nfs(as_json: JsonOption = False) -> None:
    """Show a host's folder in guests, over datagrams (the guide's figure 1-2).

    In a private fabric two guests mount a folder of the host by NFS; the server is killed while
    one of them writes; the other one reads the same, and a third is refused.  Exits with 1 if
    anything went wrong.  Needs pyfuse3, fusermount3 and /dev/fuse.
    """
    from .nfs import play

    _perform(play, as_json)


def demo(as_json: bool = False) -> None:
    """The guide's chapters 3 to 5."""
    _perform(_play, as_json)


#: What plays a demo, with progress or without: what was done, and what was measured.
Play = Callable[["Stage", bool], tuple[list[Step], dict[str, Any]]]


def _perform(play: Play, as_json: bool) -> None:
    """Play it, with progress on standard error, and print what came of it."""
    from .stage import Stage  # here: it takes a while, and other commands' time

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
        raise typer.Exit(1)


def _play(stage: Stage, show_progress: bool) -> tuple[list[Step], dict[str, Any]]:
    host, guest, other = stage.fabric.host, stage.fabric.guest(), stage.fabric.guest()
    # All at once: it is Python's start that takes the time.
    receiver = stage.serve(host, "receive_files", host.cid, FILES)
    tcp_receiver = stage.serve(host, "receive_files", "127.0.0.1", 0)
    sources = stage.serve(host, "tell_sources", SOURCES)
    listener = stage.serve(other, "accept_anybody", PRIVATE)
    sender = stage.start(guest, "send_files", host.cid, FILES)
    for service in (receiver, sources, listener):
        service.hear()
    tcp_sender = stage.start(guest, "send_files", *tcp_receiver.hear()["ready"])

    steps = [_send_files(sender, guest.cid, show_progress)]
    for asking in (guest, other):
        asked = stage.start(asking, "ask_for_source", host.cid, SOURCES).hear()
        steps.append(_judge_datagrams(asked, asking.cid))
    refused = stage.start(guest, "try_to_connect", other.cid, PRIVATE).hear()["errno"]
    steps.append(_judge_refusal(refused, guest.cid, other.cid))
    allowed = stage.start(host, "try_to_connect", other.cid, PRIVATE).hear()["errno"]
    noted = listener.hear() if allowed == 0 else None
    steps.append(_judge_permission(allowed, noted, other.cid))
    measured = _measure(sender, tcp_sender)
    steps += _judge_throughput(measured)
    return steps, measured


def _send_files(sender: Program, cid: int, show_progress: bool) -> Step:
    offered = sender.hear()
    sender.tell("loudly")
    with progress("files to the host", offered["bytes"], show_progress) as advance:
        while "seconds" not in (said := sender.hear()):
            advance(said["sent"])
    # What each side computed from the bytes it had, and what each says of the client's address.
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


def _judge_datagrams(asked: dict[str, Any], cid: int) -> Step:
    source, us = asked["answer"]["source"], asked["us"]
    ok = source == us and us[0] == cid and asked["service"] == [2, SOURCES]
    result = "the host saw {}:{}".format(*source)
    result += ", the true source" if ok else ", but the source is {}:{}".format(*us)
    return Step("datagrams", f"guest {cid} and host", ok, result)


def _judge_refusal(code: int, cid: int, other: int) -> Step:
    result = f"refused: {errno.errorcode.get(code, code)} ({os.strerror(code)})"
    ok = code == errno.EHOSTUNREACH
    return Step(
        "guest to guest", f"guest {cid} to guest {other}", ok, result if code else "connected!"
    )


def _judge_permission(code: int, noted: dict[str, Any] | None, cid: int) -> Step:
    ok = code == 0 and noted is not None and noted["client"][0] == 2
    result = "the same listener answers the host" if ok else f"{os.strerror(code)}, saw {noted}"
    return Step("host to guest", f"host to guest {cid}", ok, result)


def _measure(sender: Program, tcp_sender: Program) -> dict[str, Any]:
    """Make the same transfer over vSockets and over TCP in turns; MB/s, MB being 1e6 bytes."""
    size = tcp_sender.hear()["bytes"]
    rates: dict[str, list[float]] = {"vsock": [], "tcp": []}
    intact = True
    for turn in range(TURNS + 1):
        for kind, program in (("tcp", tcp_sender), ("vsock", sender)):
            program.tell("quietly")
            receipt = program.hear()
            intact = intact and receipt["intact"] and receipt["bytes"] == size
            if turn > 0:  # the first one finds cold memory
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


def _judge_throughput(measured: dict[str, Any]) -> list[Step]:
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
def progress(what: str, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error; the function it gives takes what is done so far."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not show, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
