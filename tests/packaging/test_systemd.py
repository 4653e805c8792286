"""The units in packaging/systemd: systemd accepts them, and their command lines are valid."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from environments.services_page import EXPOSURES

FOLDER = Path(__file__).parents[2] / "packaging" / "systemd"
UNITS = sorted(FOLDER.iterdir())

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze"
)


def analyze(*arguments: object) -> str:
    done = subprocess.run(
        ["systemd-analyze", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


@needs_systemd
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    """Replace /usr/bin by the scripts folder of this environment."""
    for unit in UNITS:
        text = unit.read_text().replace("/usr/bin/vsock", f"{Path(sys.executable).parent}/vsock")
        (tmp_path / unit.name).write_text(text)
    said = analyze("verify", "--man=no", *(tmp_path / unit.name for unit in UNITS))
    assert "vsock" not in said, said


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_exposure_is_low(unit: Path) -> None:
    threshold = round(10 * EXPOSURES[unit.name])
    analyze("security", "--offline=yes", "--no-pager", f"--threshold={threshold}", unit)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_command_line_is_valid(unit: Path) -> None:
    found = re.search(r"^ExecStart=/usr/bin/(.*)$", unit.read_text(), re.MULTILINE)
    assert found
    program, *arguments = found[1].replace("%i", "5").split()
    words = [argument for argument in arguments if not argument.startswith("/")]
    command = [word for word in words if not word.startswith("-") and not word.isdecimal()]
    done = subprocess.run(
        [Path(sys.executable).parent / program, *command, "--help"],
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    for option in (word for word in words if word.startswith("-")):
        assert option in done.stdout
