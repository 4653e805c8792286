"""``vsock doctor``."""

from __future__ import annotations

import json
from pathlib import Path

from .vsock import Vsock


def test_findings(alone: Vsock) -> None:
    findings = {finding["what"]: finding for finding in alone.json("doctor")}
    assert findings["fabric (vsockd)"]["state"] == "yes"
    assert {"KVM", "QEMU", "FUSE", "kernel AF_VSOCK", "pidfd_getfd"} <= findings.keys()
    # The tests of ``vsock run`` need it as well.
    assert findings["seccomp notification"]["state"] != "no", findings["seccomp notification"]
    for finding in findings.values():
        assert finding["state"] in ("yes", "no", "partly")
        assert finding["detail"]
        assert finding["state"] != "no" or finding["install"]
    assert not alone.folder.exists()  # doctor uses a private fabric


def test_the_table_fits_a_terminal(alone: Vsock) -> None:
    alone.environment["COLUMNS"] = "80"
    lines = alone("doctor").stdout.splitlines()
    assert lines[0].split()[:2] == ["WHAT", "DETAIL"]
    assert all(len(line) <= 80 for line in lines)


def test_a_machine_without_a_working_fabric(alone: Vsock, tmp_path: Path) -> None:
    # A vsockd that cannot start.
    (tmp_path / "resource.py").write_text("raise ImportError('no limits here')\n")
    alone.find_modules_in(tmp_path)
    fabric = json.loads(alone("doctor", "--json", expect=1).stdout)[0]
    assert (fabric["state"], fabric["detail"]) == ("no", "ImportError: no limits here")
