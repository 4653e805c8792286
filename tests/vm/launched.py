"""A machine that ``vsock vm run`` runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from vsockets.testing import PrivateFabric
from vsockets.vm.guest_image import COMMAND_LINE, KernelImage

from . import downloads
from .machine import Machine


class Launched(Machine):
    """As :class:`Machine`; ``qemu`` is the command's process, and the device is its own."""

    def __init__(
        self,
        fabric: PrivateFabric,
        kernel: KernelImage,
        initrd: Path,
        folder: Path,
        *options: str,
        cid: int,
        device: str = "vmci",
        vmx: Path | None = None,
    ) -> None:
        """``vmx``: what it is described by, with its ``cid``; instead of the kernel."""
        super().__init__(fabric, kernel, initrd, folder, *options, cid=cid, device=device)
        self._vmx = vmx

    def start_device(self) -> None:
        """It does so itself."""

    def boot(self) -> None:
        """Start it and wait for the guest."""
        command = [sys.executable, "-m", "vsockets.cli", "--dir", str(self.fabric.folder)]
        # Never KVM: what a machine that runs tests has under that name need not be one.
        command += ["vm", "run", "--accel", "tcg", "--qemu", downloads.qemu()]
        if self._vmx is None:
            command += ["--cid", str(self.cid), "--device", self.kind, "--append", COMMAND_LINE]
            command += ["--kernel", str(self._kernel.image), "--initrd", str(self._initrd)]
        else:
            command += ["--vmx", str(self._vmx)]
        command += [*self._options, "--", *self._doors()]
        with (
            open(self._folder / "console", "wb") as console,
            open(self._folder / "qemu.log", "wb") as log,
        ):
            self.qemu = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=console, stderr=log
            )
        self._connect_agent()
        self.wait_for_boot()

    @property
    def log(self) -> str:
        """What the command said."""
        return (self._folder / "qemu.log").read_text()

    @property
    def device_log(self) -> str:
        """What the device said, which the command passes on."""
        return self.log
