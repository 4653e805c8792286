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
    """A :class:`Machine` whose ``qemu`` is ``vsock vm run``, which runs the device itself."""

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
        """``vmx`` describes the machine, including its ``cid``, instead of the kernel."""
        super().__init__(fabric, kernel, initrd, folder, *options, cid=cid, device=device)
        self._vmx = vmx

    def start_device(self) -> None:
        """Do nothing: ``vsock vm run`` starts the device."""

    def boot(self) -> None:
        """Start the command and wait for the guest."""
        command = [sys.executable, "-m", "vsockets.cli", "--dir", str(self.fabric.folder)]
        # KVM is never used: on a test machine, it may be emulated.
        command += ["vm", "run", "--accel", "tcg", "--qemu", downloads.qemu()]
        if self._vmx is None:
            command += ["--cid", str(self.cid), "--device", self.kind, "--append", COMMAND_LINE]
            command += ["--kernel", str(self._kernel.image), "--initrd", str(self._initrd)]
        else:
            command += ["--vmx", str(self._vmx)]
        command += [*self._options, "--", *self._control_channels()]
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
        """The output of the command."""
        return (self._folder / "qemu.log").read_text()

    @property
    def device_log(self) -> str:
        """The output of the device, which the command passes on."""
        return self.log
