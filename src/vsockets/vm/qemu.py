"""A QEMU that supports a device: the machine's own, or one unpacked beside it."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

from .apt import CACHE, DEBIAN, Suite, Unavailable, filled
from .qemu_args import PROGRAM

#: Timeout for QEMU's version or help, in seconds; it takes a tenth of one.
_PATIENCE = 20.0

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


class Need(NamedTuple):
    """A device's requirements of QEMU."""

    driver: str  #: QEMU's name of its side of the device
    since: tuple[int, int]  #: the first version that has it


NEEDS = {
    "vmci": Need("vfio-user-pci", (10, 1)),
    "virtio": Need("vhost-user-vsock-pci", (5, 1)),
}


class NoQemu(Exception):
    """No suitable QEMU was found; the message says what to install."""


class TooOld(NoQemu):
    """QEMU is older than the device."""


class Broken(NoQemu):
    """QEMU does not work."""


class Qemu(NamedTuple):
    """A QEMU program and its version."""

    path: str
    version: tuple[int, int]

    @property
    def number(self) -> str:
        """The version as text."""
        return ".".join(map(str, self.version))

    def require(self, device: str) -> None:
        """Check that QEMU supports ``device``.

        Raises TooOld or Broken.
        """
        need = NEEDS[device]
        since = ".".join(map(str, need.since))
        if self.version < need.since:
            raise TooOld(
                f"{self.path} is QEMU {self.number}, too old for the {device} device "
                f"({need.driver} came with {since}): {advice(device)}"
            )
        # Not a list of all drivers: for that, QEMU loads every module, also another QEMU's, and
        # aborts.
        said = _said(self.path, "-device", f"{need.driver},help")
        if f"{need.driver} options:" in said:
            return
        what = f"{self.path}, QEMU {self.number}"
        if f"'{need.driver}' not found" in said:
            raise Broken(f"{what}, was built without {need.driver}: {advice(device)}")
        raise Broken(f"{what}, does not work: its help on {need.driver} is: {_last_line(said)}")


def advice(device: str) -> str:
    """Return instructions for getting a QEMU that supports ``device``."""
    if device == "virtio":
        return "apt install qemu-system-x86"
    return (
        "apt install -t trixie-backports qemu-system-x86 on Debian 13, qemu-system-x86 on Ubuntu "
        "25.10 or later; or --download, which unpacks one below ~/.cache without installing it; "
        "or --device virtio"
    )


def examine(path: str) -> Qemu:
    """Return the version of a QEMU program.

    Raises Broken.
    """
    said = _said(path, "--version")
    found = re.search(r"version (\d+)\.(\d+)", said)
    if found is None:
        raise Broken(f"{path} does not work: its version is: {_last_line(said)}")
    return Qemu(path, (int(found[1]), int(found[2])))


def find(device: str, program: str | None = None, download: bool = False) -> Qemu:
    """Return a QEMU that supports ``device``.

    It is ``program`` if given; else the one on the PATH; else the unpacked one, which ``download``
    unpacks if it is missing.  Raises NoQemu and Unavailable.
    """
    path = shutil.which(program or PROGRAM)
    if path is None and program is not None:
        raise NoQemu(f"program not found: {program}")
    try:
        if path is None:
            raise NoQemu(f"{PROGRAM} not found: {advice(device)}")
        found = examine(path)
        found.require(device)
        return found
    except NoQemu:
        if program is not None or not (download or (CACHE / _UNPACKED).exists()):
            raise
    found = examine(unpacked())
    found.require(device)
    return found


def unpacked() -> str:
    """Return a QEMU that supports every device, unpacked with its libraries and firmware.

    Raises Unavailable.
    """

    def fill(folder: Path) -> None:
        wanted = ("libc6", "qemu-system-x86", "qemu-system-common", "qemu-system-data", "ovmf")
        _BACKPORTS.unpack(folder, *_BACKPORTS.with_dependencies(*wanted))
        program = folder / PROGRAM
        program.write_text(_START.format(program=PROGRAM))
        program.chmod(0o755)

    return str(filled(_UNPACKED, fill) / PROGRAM)


def find_firmware() -> str:
    """Return the path of a UEFI firmware.

    Raises Unavailable.
    """
    for root in (Path("/"), CACHE / _UNPACKED):
        path = root / "usr/share/ovmf/OVMF.fd"
        if path.exists():
            return str(path)
    raise Unavailable("UEFI firmware not found: apt install ovmf")


def _said(*command: str) -> str:
    """Return a program's output, followed by the signal if one killed it."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_PATIENCE,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    code = done.returncode
    # A shell, or the loader's script, reports a signal as 128 plus its number.
    killed = -code if code < 0 else code - 128
    if killed <= 0 or killed > signal.NSIG:
        return done.stdout
    said = done.stdout.strip()
    how = f"killed by signal {killed} ({signal.strsignal(killed)})"
    return f"{said} ({how})" if said else how


def _last_line(said: str) -> str:
    return said.strip().rpartition("\n")[2] or "nothing"
