"""A vsockd with configuration files: start and reload."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vsockets
from vsockets import Attachment
from vsockets.testing import PrivateFabric, wait_until

from .guest_changes import assert_stands, stream

CONFIGURED = """
[limits]
sockets = 100

[[context]]
cid = 7
name = "web"
profile = "restricted"

[[context]]
name = "dark"
power = "off"
"""


@pytest.fixture
def configured(vsock_fabric: PrivateFabric) -> Path:
    return vsock_fabric.configuration / "guests.toml"


def rows(fabric: PrivateFabric) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in fabric.control.contexts() if row["limits"]}


def run_vsockd(tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "guests.toml").write_text(text)
    state = str(tmp_path / "state")
    command = [sys.executable, "-m", "vsockets.daemon", "--dir", state, "--config", str(tmp_path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)


def test_it_starts_with_what_is_configured(vsock_fabric: PrivateFabric, configured: Path) -> None:
    configured.write_text(CONFIGURED)
    vsock_fabric.stop()
    vsock_fabric.start()
    guests = rows(vsock_fabric)
    assert guests["web"]["cid"] == 7
    assert guests["web"]["profile"] == "restricted"
    assert guests["web"]["limits"]["sockets"] == 100
    assert guests["dark"]["state"] == "off"
    assert not (vsock_fabric.folder / str(guests["dark"]["cid"])).exists()
    vsock_fabric.control.power_on(guests["dark"]["cid"])
    assert (vsock_fabric.folder / str(guests["dark"]["cid"]) / "stream").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[[context]]\ncid = 2\n", "guests.toml:2: context.cid:"),
        ("[limits]\n\nsockets = 0\n", "guests.toml:3: limits.sockets:"),
        ("[[context]]\ncid = 3\npowr = 1\n", "guests.toml:3: context.powr:"),
        ("[[context]\n", "guests.toml:1:"),
    ],
)
def test_it_does_not_start_with_an_error(tmp_path: Path, text: str, told: str) -> None:
    """EX_CONFIG of sysexits.h, and one line."""
    done = run_vsockd(tmp_path, text)
    assert done.returncode == os.EX_CONFIG == 78
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"vsockd: {tmp_path}/{told}")
    assert not (tmp_path / "state" / "control").exists()


def by_signal(fabric: PrivateFabric) -> None:
    done = fabric.log.count("was reloaded")
    os.kill(fabric.pid, signal.SIGHUP)
    wait_until(lambda: fabric.log.count("was reloaded") > done, "the signal to be heeded")


def by_request(fabric: PrivateFabric) -> None:
    fabric.control.reload()


@pytest.mark.parametrize("reload", [by_signal, by_request])
def test_nothing_is_dropped(vsock_fabric: PrivateFabric, configured: Path, reload: Any) -> None:
    configured.write_text("[[context]]\ncid = 3\n[[context]]\ncid = 4\n")
    reload(vsock_fabric)
    guest = Attachment(vsock_fabric.folder / "3")
    with (
        stream(vsock_fabric.host, guest) as first,
        stream(guest, vsock_fabric.host) as second,
        vsockets.create_server((3, 5000), context=guest) as server,
    ):
        # Other isolation, other limits, a guest more and one less.
        configured.write_text(
            '[[context]]\ncid = 3\nprofile = "restricted"\nlimits = { sockets = 1 }\n'
            "[[context]]\ncid = 5\n"
        )
        reload(vsock_fabric)
        changed = rows(vsock_fabric)
        assert set(changed) == {"guest-3", "guest-4", "guest-5"}
        assert changed["guest-3"]["profile"] == "restricted"
        assert changed["guest-3"]["limits"]["sockets"] == 1
        assert_stands(*first)
        assert_stands(*second)
        with vsockets.create_connection((3, 5000), context=vsock_fabric.host) as client:
            accepted, _ = server.accept()
            with accepted:
                assert_stands(client, accepted)


def test_an_error_leaves_the_old_configuration_in_force(
    vsock_fabric: PrivateFabric, configured: Path
) -> None:
    configured.write_text(CONFIGURED)
    vsock_fabric.control.reload()
    before = vsock_fabric.control.contexts()
    configured.write_text(CONFIGURED.replace("sockets = 100", "sockets = 5") + "\n[[grant]]\n")
    with pytest.raises(OSError, match=rf"{configured}:14: grant: ") as refusal:
        vsock_fabric.control.reload()
    assert "\n" not in str(refusal.value)
    assert vsock_fabric.control.contexts() == before
    # After a signal, only the log reports it.
    vsock_fabric.expect_errors()
    os.kill(vsock_fabric.pid, signal.SIGHUP)
    told = f"vsockd: ERROR: cannot reload, the configuration is unchanged: {configured}:14: grant:"
    wait_until(lambda: told in vsock_fabric.log, "the log to say so")
    assert vsock_fabric.control.contexts() == before
    # Without the error it is read.
    configured.write_text(CONFIGURED.replace("sockets = 100", "sockets = 5"))
    vsock_fabric.control.reload()
    assert rows(vsock_fabric)["web"]["limits"]["sockets"] == 5


def test_a_vmx_file_beside_it(vsock_fabric: PrivateFabric, configured: Path) -> None:
    (vsock_fabric.configuration / "old.vmx").write_text(
        '.encoding = "UTF-8"\nvirtualHW.version = "7"\nvmci0.present = "TRUE"\n'
        'vmci0.id = "-1791447150"\nvmci0.unrestricted = "TRUE"\nvmci0.domain = "lab"\n'
        'displayName = "old machine"\n'
    )
    configured.write_text('[[context]]\nvmx = "old.vmx"\nprofile = "legacy"\n')
    vsock_fabric.control.reload()
    machine = rows(vsock_fabric)["old machine"]
    assert machine["cid"] == 2**32 - 1791447150
    assert (machine["unrestricted"], machine["domain"]) == (True, "lab")
