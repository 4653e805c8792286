"""Tables in 80 columns, with the longest names and VMware's CIDs: no number is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from rich.console import Console

from vsockets.cli import ls, top
from vsockets.cli.output import Column, make_table
from vsockets.cli.perf import Measurement, print_report
from vsockets.perf.measures import Result
from vsockets.testing import PrivateFabric

from .vsock import Vsock

VMWARE_CID = 2503520146  # README's
LONG_NAME = "a-virtual-machine-with-a-rather-long-name"


def drawn(columns: Sequence[Column], rows: Sequence[Sequence[Any]], width: int) -> list[str]:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(make_table(columns, rows, width))
    lines = [line.rstrip() for line in capture.get().splitlines()]
    assert len(lines) == 1 + len(rows), lines  # no row is wrapped
    assert all(len(line) <= width for line in lines), lines
    assert "…" not in lines[0]  # no title is cut
    return lines


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
@pytest.mark.parametrize("cid", [3, VMWARE_CID])
def test_contexts_in_top(width: int, cid: int) -> None:
    rates = dict.fromkeys(("connects", "accepts", "refusals", "denials"), 12345.6)
    row = {"cid": cid, "name": LONG_NAME, "state": "suspended", "sockets": 4096, "streams": 4096}
    row |= {"send_rate": 123456.7, "receive_rate": 0.0}
    _, line = drawn(top.CONTEXT_COLUMNS, [top.context_row({**row, "rates": rates})], width)
    assert line.split()[0] == str(cid)
    assert "a-virtu" in line and line.count("…") <= 1
    assert ("suspended" in line) is (width >= 80)
    assert "123k" in line or width < 80
    if width >= 120:
        assert line.count("1234") == 4


@pytest.mark.parametrize("width", [80, 100, 200])
def test_sockets(width: int) -> None:
    address = f"{VMWARE_CID}:4294967295"
    row = {
        "type": "seqpacket",
        "state": "established",
        "cid": VMWARE_CID,
        "port": 4294967295,
        "receive_queue": 262144,
        "send_queue": 262144,
        "buffer": 262144,
        "name": LONG_NAME,
        "peer": [VMWARE_CID, 4294967295],
        "pid": 1234567,
        "user": "administrator",
        "command": "a-program-of-15",
        "send_rate": 123456.7,
        "receive_rate": 0.0,
    }
    _, line = drawn(ls.COLUMNS, [ls.socket_row(row)], width)
    assert line.count(address) == 2
    assert "1234567" in line
    assert "123k" in line or width < 200


def test_contexts(vsock: Vsock, fabric: PrivateFabric) -> None:
    vsock.environment["COLUMNS"] = "80"
    guest = fabric.guest(VMWARE_CID, name=LONG_NAME)
    legacy: dict[str, Any] = {"profile": "legacy", "unrestricted": True, "domain": "a-laboratory"}
    other = fabric.guest(VMWARE_CID + 1, name=LONG_NAME, **legacy)
    fabric.control.suspend(guest.cid)
    try:
        lines = vsock("context", "ls").stdout.splitlines()
        assert all(len(line) <= 80 for line in lines)
        rows = [line for line in lines if line.startswith(str(VMWARE_CID)[:9])]
        assert [row.split()[0] for row in rows] == [str(guest.cid), str(other.cid)]
        assert "suspended" in rows[0] and "a-virtu" in rows[0] and "a-virtu" in rows[1]
        assert len(lines) == 1 + len(fabric.control.contexts())  # no row is wrapped
    finally:
        for place in (guest, other):
            fabric.control.remove_context(place.cid)


@pytest.mark.parametrize("width", [80, 100])
def test_a_report_of_perf(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    details = dict.fromkeys(("p50", "p90", "p99", "p99.9", "maximum"), 12345.6)
    addresses = {"vsock:2:5000": 51.7, "unix:/run/user/1000/a-service-with-a-long-path.sock": 103.4}
    results = {
        address: Result("Round trip", value, "microseconds", False, details)
        for address, value in addresses.items()
    }
    print_report([Measurement(64, results)])
    _, title, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and max(map(len, (title, *lines))) <= width
    assert "…" not in title
    for line, value in zip(lines, ("51.7", "103.4"), strict=True):
        assert value in line and line.count("12,346") >= 3
