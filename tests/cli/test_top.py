"""``vsock top``."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess

import pytest

import vsockets
from vsockets.cli.observation import Rates
from vsockets.testing import PrivateFabric

from .terminal import Terminal
from .vsock import PATIENCE, PROGRAM, Vsock


def counts(cid: int, connects: int, denials: int = 0) -> dict[str, object]:
    row = {"cid": cid, "connects": connects, "accepts": 0, "refusals": denials}
    return {"contexts": [{**row, "denials": {"restricted": denials}}]}


def test_rates_are_differences_over_time() -> None:
    rates = Rates()
    assert rates.update(counts(3, 100, 7), 10.0) == {}
    assert rates.update(counts(3, 130, 8), 12.0) == {
        3: {"connects": 15.0, "accepts": 0.0, "refusals": 0.5, "denials": 0.5}
    }


def test_counters_of_a_new_context_begin_at_zero() -> None:
    rates = Rates()
    rates.update(counts(3, 100), 10.0)
    assert rates.update(counts(4, 5), 11.0)[4]["connects"] == 5.0
    assert rates.update(counts(4, 2), 12.0)[4]["connects"] == 2.0  # a new context with the same CID


def names(lines: list[str]) -> list[str]:
    """Return the names of the three contexts in the order shown."""
    return [line.split()[1] for line in lines[3:6] if len(line.split()) > 1]


def test_contexts_streams_and_denials(vsock: Vsock, fabric: PrivateFabric) -> None:
    guest, other = fabric.guest(name="web"), fabric.guest(name="db")
    with (
        vsockets.create_server((2, 5000), context=fabric.host) as server,
        Terminal(vsock.environment, "top", "--interval", 0.2) as view,
    ):
        view.wait_for(lambda lines: any("DENIALS" in line for line in lines))
        with (
            vsockets.create_connection((2, 5000), context=guest) as client,
            vsockets.create_connection((2, 5000), context=guest),
            server.accept()[0],
        ):
            client.sendall(b"seven..")
            with pytest.raises(OSError):
                vsockets.create_connection((other.cid, 5000), context=guest)
            view.wait_for(lambda lines: any(" guest-to-guest: " in line for line in lines))
            # The screen may be read while it is drawn.
            view.wait_for(
                lambda lines: (
                    [f"{guest.cid}", "2:5000", "stream", "2", "0", "7", "-"]
                    in [line.split() for line in lines]
                )
            )
            context = [f"{guest.cid}", "web", "running", "2", "2"]
            view.wait_for(lambda lines: context in [line.split()[:5] for line in lines])
            view.wait_for(lambda lines: "3 contexts, 2 streams" in lines[0])
            view.press("i")
            view.wait_for(lambda lines: lines[1].startswith("sorted by cid"))
            view.wait_for(lambda lines: names(lines) == ["host", "web", "db"])
            view.press("s")
            view.wait_for(lambda lines: lines[1].startswith("sorted by streams"))
            view.wait_for(lambda lines: names(lines)[-1:] == ["db"])
        view.press("q")
        view.finish()


def test_json_has_rates(vsock: Vsock, fabric: PrivateFabric) -> None:
    guest = fabric.guest()
    with vsockets.create_server((2, 5001), context=fabric.host) as server:
        running = vsock.start("top", "--json", "--interval", 0.1)
        first = json.loads(running.read_line())
        assert {row["rates"] for row in first["contexts"]} == {None}
        with vsockets.create_connection((2, 5001), context=guest), server.accept()[0]:
            risen = None
            while not risen:  # until its next lines
                (row,) = [
                    row
                    for row in json.loads(running.read_line())["contexts"]
                    if row["cid"] == guest.cid
                ]
                risen = row["rates"]["connects"]
            assert row["connects"] == row["streams"] == 1


def test_top_needs_a_terminal(vsock: Vsock) -> None:
    line = vsock.fails("top", status=2)
    assert line.startswith("standard output is not a terminal (expected one, or --json)")
    assert "Invalid value" not in line


def test_top_ends_with_vsockd(alone: Vsock) -> None:
    alone("up")
    with Terminal(alone.environment, "top", "--interval", 0.2) as view:
        view.wait_for(lambda lines: any("DENIALS" in line for line in lines))
        alone("down")
        line = view.finish(status=1)
        assert line.startswith("vsock: ") and line.count("\n") == 1
        assert "has gone" in line or "has ended" in line


def test_events_names_its_topics_on_a_terminal(vsock: Vsock) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, "events", "denial"],
        env=vsock.environment,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    try:
        said = b""
        while not said.endswith(b"\n"):
            assert select.select([ours], [], [], PATIENCE)[0]
            said += os.read(ours, 1000)
        assert said == b"vsock: following events: denial (Ctrl-C ends)\r\n"
    finally:
        process.kill()
        process.wait(PATIENCE)
        os.close(ours)
        os.close(theirs)
