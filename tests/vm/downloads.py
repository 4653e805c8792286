"""What tests boot: Debian's, whatever distribution this machine has."""

from __future__ import annotations

from pathlib import Path

from vsockets.vm.initramfs import Userland
from vsockets.vm.kernels import Kernel
from vsockets.vm.packages import DEBIAN, Suite, Unavailable, filled
from vsockets.vm.qemu import unpacked as qemu

__all__ = ["Unavailable", "kernel", "qemu", "rust_back_end", "userland"]

_STABLE = Suite(DEBIAN, "bookworm")
_TESTING = Suite(DEBIAN, "forky")
_SUITES = {"stable": _STABLE, "newest": Suite(DEBIAN, "trixie", "trixie-backports")}


def kernel(name: str) -> Kernel:
    """``stable`` (6.1) or ``newest``."""
    linux = Kernel(_SUITES[name])
    linux.name = name
    return linux


def userland() -> Userland:
    """What runs in a guest: busybox and Python."""
    return Userland(_STABLE)


def rust_back_end() -> Path:
    """Where Debian's ``vhost-device-vsock`` is unpacked, with libraries of its own."""

    def fill(folder: Path) -> None:
        _TESTING.unpack(folder, *_TESTING.with_dependencies("vhost-device-vsock", "libc6"))

    return filled("vhost-device-vsock", fill)
