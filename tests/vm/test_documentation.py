"""QEMU's command lines in the documentation, as a reader copies them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from vsockets.testing import PrivateFabric

from . import downloads
from .conftest import Stage
from .machine import Machine

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("device", ["virtio", "vmci"])
def test_command_line_of_qemu(stage: Stage, fabric_of_machines: PrivateFabric, device: str) -> None:
    """The machine reaches its boot loader, and QEMU prints no warning."""
    _, _, folder = parts = stage.parts("stable", device)  # skips without QEMU
    text = (DOCS / f"{device}.md").read_text()
    command = text[text.index("\nqemu-system-x86_64 ") :].partition("\n```")[0]
    (path,) = set(re.findall(r"/run/vm5[.\w]*", command))
    command = command.replace(path, str(folder / device)).replace("-accel kvm ", "")
    command = command.replace("qemu-system-x86_64", f"exec {downloads.qemu()}")
    (folder / "disk.img").write_bytes(bytes(1 << 20))
    machine = Machine(fabric_of_machines, *parts, device=device)
    machine.start_device()
    with subprocess.Popen(
        ["sh", "-c", command],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as qemu:
        try:
            assert qemu.stdout is not None
            output = ""
            for line in qemu.stdout:
                output += line
                if "Booting from Hard Disk" in line:
                    break
            assert "Booting from Hard Disk" in output, output
            assert "warning" not in output
        finally:
            qemu.kill()
            machine.kill()
