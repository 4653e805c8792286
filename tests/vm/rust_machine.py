"""Machines with Debian's ``vhost-device-vsock``, the real peer of hybrid vsock."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

from vsockets.testing import wait_until

from . import downloads
from .machine import PATIENCE, Machine


class RustMachine(Machine):
    """A machine whose host side is the unix socket :attr:`uds_path`, without vsockets."""

    @property
    def uds_path(self) -> Path:
        """The unix socket for connects to the guest, and the prefix of those for its own."""
        return self._folder / "host"

    def start_device(self) -> None:
        self.cid = self.cid or 3
        root = downloads.rust_back_end()
        libraries = root / "usr/lib/x86_64-linux-gnu"
        command = [root / "usr/lib64/ld-linux-x86-64.so.2", "--library-path", libraries]
        command += [root / "usr/bin/vhost-device-vsock", "--guest-cid", self.cid]
        command += ["--socket", self._path, "--uds-path", self.uds_path]
        with open(self._folder / "device.log", "w") as log:
            self.device = subprocess.Popen(
                list(map(str, command)), stdout=subprocess.PIPE, stderr=log, text=True
            )
        wait_until(self._path.exists, "vhost-device-vsock to start", PATIENCE)

    def kill_device(self) -> None:
        """Kill the back end, which leaves its sockets behind."""
        assert self.device is not None
        self.device.kill()
        self.device.wait()
        assert self.device.stdout is not None
        self.device.stdout.close()
        for path in (self._path, self.uds_path):
            path.unlink(missing_ok=True)


class HybridMachine(RustMachine):
    """A machine whose guest ``vsock device hybrid`` attaches to the fabric."""

    _hybrid: subprocess.Popen[str] | None = None

    @property
    def hybrid(self) -> subprocess.Popen[str]:
        """The process of ``vsock device hybrid``."""
        assert self._hybrid is not None
        return self._hybrid

    @property
    def device_log(self) -> str:
        """The log of ``vsock device hybrid``."""
        return (self._folder / "hybrid.log").read_text()

    def start_device(self) -> None:
        self.attach()
        super().start_device()

    def attach(self) -> None:
        """Start ``vsock device hybrid``."""
        command = [sys.executable, "-m", "vsockets.cli", "--dir", str(self.fabric.folder)]
        command += ["device", "hybrid", "--socket", str(self.uds_path), "--verbose"]
        if self.cid:
            command += ["--cid", str(self.cid)]
        with open(self._folder / "hybrid.log", "a") as log:
            self._hybrid = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self._hybrid.stdout is not None
        line = self._hybrid.stdout.readline()
        assert line.strip().isdecimal(), self.device_log
        self.cid = int(line)

    def detach(self) -> None:
        """Kill ``vsock device hybrid``."""
        if self._hybrid is not None:
            self._hybrid.kill()
            self._hybrid.wait()
            assert self._hybrid.stdout is not None
            self._hybrid.stdout.close()
            self._hybrid = None

    def kill(self) -> None:
        super().kill()
        with contextlib.suppress(ProcessLookupError):
            self.detach()
