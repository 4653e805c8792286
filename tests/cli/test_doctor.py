"""``vsock doctor``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(("columns", "width"), [("60", 60), (None, 80)], ids=["narrow", "piped"])
def test_the_table_fits_a_terminal(alone: Vsock, columns: str | None, width: int) -> None:
    alone.environment.pop("COLUMNS", None)
    if columns is not None:
        alone.environment["COLUMNS"] = columns
    lines = alone("doctor").stdout.splitlines()
    assert lines[0].split()[:2] == ["WHAT", "DETAIL"]
    assert all(len(line) <= width for line in lines)


def test_a_cache_that_cannot_be_searched(tmp_path: Path) -> None:
    """As with another user's HOME: it has no QEMU, and the other checks go on."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    (home := tmp_path / "home").mkdir(0o700)
    find = """if True:
        import os, sys
        import vsockets.vm.qemu  # that user may be unable to read it
        from vsockets.cli.doctor import qemu
        os.setgroups([])
        os.setuid(65534)
        print(qemu().what)
    """
    done = subprocess.run(
        [sys.executable, "-c", find],
        env={**os.environ, "HOME": str(home), "PATH": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "QEMU\n", done.stderr


def test_a_machine_without_a_working_fabric(alone: Vsock, tmp_path: Path) -> None:
    # A vsockd that cannot start.
    (tmp_path / "resource.py").write_text("raise ImportError('no limits here')\n")
    alone.find_modules_in(tmp_path)
    fabric = json.loads(alone("doctor", "--json", expect=1).stdout)[0]
    assert (fabric["state"], fabric["detail"]) == ("no", "ImportError: no limits here")


#: Prints the advice for a device that this user cannot open.
ADVICE = """
import os, sys
from vsockets.cli.doctor import _accessible
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
print(_accessible(sys.argv[1]).install)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="gives files to groups: needs root")
@pytest.mark.parametrize(
    ("group", "mode", "expected"),
    [(65533, 0o660, "65533"), (0, 0o660, "chgrp GROUP"), (65533, 0o600, "chmod 660")],
)
def test_advice_is_never_to_join_the_group_of_root(group: int, mode: int, expected: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # another user cannot enter pytest's
        os.chmod(folder, 0o711)
        device = Path(folder, "device")
        device.touch()
        os.chown(device, 0, group)
        device.chmod(mode)
        done = subprocess.run(
            [sys.executable, "-c", ADVICE, device],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert expected in done.stdout, done.stdout + done.stderr
    assert "group root" not in done.stdout
