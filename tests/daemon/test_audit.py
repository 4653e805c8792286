"""Every denial is written down: both addresses, the program, the rule (docs/security.md)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vsockets
from vsockets.control import Control
from vsockets.testing import PrivateFabric

#: What docs/security.md says a denial has.
FIELDS = {
    *("context", "operation", "source", "destination", "rule", "reason", "errno"),
    *("pid", "uid", "gid", "executable", "left_out", "message"),
}


def be_denied(context: vsockets.Attachment, cid: int) -> None:
    with pytest.raises(OSError):
        vsockets.create_connection((cid, 5000), context=context)


def test_a_denial_as_an_event(vsock_fabric: PrivateFabric) -> None:
    guest, _ = vsock_fabric.guest(3), vsock_fabric.guest(4)
    with vsock_fabric.control.events("denial") as events:
        be_denied(guest, 4)
        event = events.wait(timeout=5)
    assert event.keys() == FIELDS | {"topic", "time", "missed"}
    assert (event["context"], event["operation"]) == (3, "connect")
    assert (event["source"], event["destination"]) == ([3, 2**32 - 1], [4, 5000])
    assert (event["rule"], event["errno"]) == ("guest-to-guest", "EHOSTUNREACH")
    assert (event["pid"], event["uid"], event["gid"]) == (os.getpid(), os.getuid(), os.getgid())
    assert event["executable"] == os.path.realpath(sys.executable)
    assert event["left_out"] == event["missed"] == 0
    assert "3:any to 4:5000" in event["message"]


def test_a_denial_in_words(vsock_fabric: PrivateFabric) -> None:
    guest, _ = vsock_fabric.guest(3), vsock_fabric.guest(4)
    be_denied(guest, 4)
    (line,) = [line for line in vsock_fabric.log.splitlines() if "denied" in line]
    assert line.startswith("vsockd: WARNING: denied: connect 3:any to 4:5000: ")
    assert f"[guest-to-guest, EHOSTUNREACH]; pid {os.getpid()} uid {os.getuid()} " in line


def test_what_is_only_not_there_is_no_denial(vsock_fabric: PrivateFabric) -> None:
    be_denied(vsock_fabric.guest(3), 99)
    assert vsock_fabric.control.status()["denials"] == 0


def test_only_so_many_are_written_and_all_are_counted(vsock_fabric: PrivateFabric) -> None:
    (vsock_fabric.configuration / "audit.toml").write_text("[audit]\nrate = 1\n")
    vsock_fabric.control.reload()
    guest, _ = vsock_fabric.guest(3), vsock_fabric.guest(4)
    for _ in range(50):
        be_denied(guest, 4)
    (row,) = [row for row in vsock_fabric.control.contexts() if row["cid"] == 3]
    assert row["denials"] == {"guest-to-guest": 50}
    written = [line for line in vsock_fabric.log.splitlines() if "denied" in line]
    told = sum(int(number) for number in re.findall(r"\((\d+) more were left out\)", str(written)))
    assert 1 <= len(written) < 50
    assert len(written) + told <= 50


def test_a_json_object_a_line(tmp_path: Path) -> None:
    ready, announce = os.pipe()
    with (
        open(ready, "rb") as readiness,
        subprocess.Popen(
            [
                *(sys.executable, "-m", "vsockets.daemon", "--dir", str(tmp_path / "fabric")),
                *("--config", str(tmp_path), "--log-json", "--ready-fd", str(announce)),
            ],
            env={**os.environ, "PYTHONPATH": str(Path(vsockets.__file__).parents[1])},
            stderr=subprocess.PIPE,
            pass_fds=[announce],
        ) as vsockd,
    ):
        try:
            os.close(announce)
            assert readiness.readline() == b"ready\n"
            with Control(tmp_path / "fabric") as control:
                guest = vsockets.attach(control.add_context(3)["folder"])
                control.add_context(4)
                be_denied(guest, 4)
        finally:
            vsockd.terminate()
        assert vsockd.stderr is not None
        lines: list[dict[str, Any]] = [json.loads(line) for line in vsockd.stderr]
    (line,) = [line for line in lines if "rule" in line]
    assert line.keys() == FIELDS | {"time", "level"}
    assert (line["level"], line["rule"]) == ("warning", "guest-to-guest")
