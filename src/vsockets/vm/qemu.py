"""A QEMU that supports a device: an installed one, or one unpacked below the cache."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

from .apt import CACHE, DEBIAN, Suite, Unavailable, cached
from .qemu_args import PROGRAM

#: Timeout for QEMU's version or help, in seconds; it takes a tenth of one.
_PROBE_SECONDS = 20.0

#: The newest QEMU for Debian's stable release.
_BACKPORTS = Suite(DEBIAN, "trixie", "trixie-backports")
_UNPACKED = "qemu-trixie-backports"

#: QEMU with its own loader and libraries: this machine's may be older.
_START = """\
#!/bin/sh
root=$(dirname "$0")
exec "$root/usr/lib64/ld-linux-x86-64.so.2" \
    --library-path "$root/usr/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu" \
    "$root/usr/bin/{program}" -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" "$@"
"""


class Requirement(NamedTuple):
    """The QEMU that a device needs."""

    driver: str  #: QEMU's name of its side of the device
    since: tuple[int, int]  #: the first version that has it


REQUIREMENTS = {
    "vmci": Requirement("vfio-user-pci", (10, 1)),
    "virtio": Requirement("vhost-user-vsock-pci", (5, 1)),
}


class QemuNotFound(Exception):
    """No suitable QEMU was found; the message says what to install."""


class QemuTooOld(QemuNotFound):
    """QEMU is older than the device."""


class QemuBroken(QemuNotFound):
    """QEMU does not work."""


class Qemu(NamedTuple):
    """A QEMU program and its version."""

    path: str
    version: tuple[int, int]

    @property
    def version_text(self) -> str:
        """The version as text."""
        return ".".join(map(str, self.version))

    def require(self, device: str) -> None:
        """Require that this QEMU supports ``device`` (a key of REQUIREMENTS).

        Raises QemuTooOld or QemuBroken if it does not.
        """
        driver, required = REQUIREMENTS[device]
        if self.version < required:
            since = ".".join(map(str, required))
            raise QemuTooOld(
                f"{self.path} is QEMU {self.version_text}, too old for the {device} device "
                f"({driver} came with {since}): {install_hint(device)}"
            )
        # Not a list of all drivers: for that, QEMU loads every module, also another QEMU's, and
        # aborts.
        output = _output(self.path, "-device", f"{driver},help")
        if f"{driver} options:" in output:
            return
        subject = f"{self.path}, QEMU {self.version_text}"
        if f"'{driver}' not found" in output:
            raise QemuBroken(f"{subject}, was built without {driver}: {install_hint(device)}")
        raise QemuBroken(
            f"{subject}, does not work; -device {driver},help printed: {_last_line(output)}"
        )


def install_hint(device: str) -> str:
    """Return instructions for getting a QEMU that supports ``device``."""
    if device == "virtio":
        return "apt install qemu-system-x86"
    return (
        "apt install -t trixie-backports qemu-system-x86 on Debian 13, qemu-system-x86 on Ubuntu "
        "25.10 or later; or vsock vm run --download, which unpacks one below ~/.cache without "
        "installing it; or --device virtio"
    )


def probe(path: str) -> Qemu:
    """Return the program ``path`` with its version.

    Raises QemuBroken if the program does not report a version.
    """
    output = _output(path, "--version")
    found = re.search(r"version (\d+)\.(\d+)", output)
    if found is None:
        raise QemuBroken(f"{path} does not work; --version printed: {_last_line(output)}")
    return Qemu(path, (int(found[1]), int(found[2])))


def find(device: str, program: str | None = None, download: bool = False) -> Qemu:
    """Return a QEMU that supports ``device``.

    The QEMU is ``program`` if given; else the one on the PATH; else the one unpacked below the
    cache, which ``download`` permits to download.

    Raises QemuNotFound if none supports the device, Unavailable if the download fails.
    """
    path = shutil.which(program or PROGRAM)
    if path is None and program is not None:
        raise QemuNotFound(f"program not found: {program}")
    try:
        if path is None:
            raise QemuNotFound(f"{PROGRAM} not found: {install_hint(device)}")
        found = probe(path)
        found.require(device)
        return found
    except QemuNotFound:
        if program is not None or not (download or os.path.exists(CACHE / _UNPACKED)):
            raise
    found = probe(unpacked())
    found.require(device)
    return found


def unpacked() -> str:
    """Return a QEMU that supports every device, unpacked with its libraries and firmware.

    Raises Unavailable if it cannot be downloaded.
    """

    def fill(folder: Path) -> None:
        wanted = ("libc6", "qemu-system-x86", "qemu-system-common", "qemu-system-data", "ovmf")
        _BACKPORTS.unpack(folder, *_BACKPORTS.with_dependencies(*wanted))
        program = folder / PROGRAM
        program.write_text(_START.format(program=PROGRAM))
        program.chmod(0o755)

    return str(cached(_UNPACKED, fill) / PROGRAM)


def find_firmware() -> str:
    """Return the path of a UEFI firmware.

    Raises Unavailable if it is missing.
    """
    for root in (Path("/"), CACHE / _UNPACKED):
        path = root / "usr/share/ovmf/OVMF.fd"
        if path.exists():
            return str(path)
    raise Unavailable("UEFI firmware not found: apt install ovmf")


def _output(*command: str) -> str:
    """Return a program's output, followed by the signal that killed the program, if any."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    code = done.returncode
    # A shell, or the loader's script, reports a signal as 128 plus its number.
    killed = -code if code < 0 else code - 128
    if killed <= 0 or killed > signal.NSIG:
        return done.stdout
    output = done.stdout.strip()
    signal_text = f"killed by signal {killed} ({signal.strsignal(killed)})"
    return f"{output} ({signal_text})" if output else signal_text


def _last_line(output: str) -> str:
    return output.strip().rpartition("\n")[2] or "nothing"
