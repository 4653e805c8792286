"""``vsock vm demo``: access to a virtual machine without a network."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ..connect import keep_trying
from ..errors import CliError
from ..output import Column, notice, print_json, print_table
from ..vm import (
    Accelerator,
    Device,
    accelerators,
    find_qemu,
    require_qmp,
)
from .command import progress

if TYPE_CHECKING:
    from ...testing import PrivateFabric
    from ...vm.guest_client import GuestClient

# Imported late, in functions: what no other command needs.

#: Errors until the guest listens: its driver is not loaded, or it is busy.
_NOT_YET = {errno.ECONNRESET, errno.EHOSTUNREACH, errno.ETIMEDOUT}

#: Seconds for the guest to boot; emulated on an idle machine it takes about five.
_BOOT = 120.0

#: Timeout of every other wait, in seconds.
_PATIENCE = 30.0

#: Seconds for ``vsock vm run`` to end after its guest.
_END_SECONDS = 2.0

#: Lines of the guest's console that are printed when it fails.
_LINES = 8

_LAST = "exec {python} -S -m vsockets.vm.guest_agent\n"

#: The copied folder in the guest, below the folder of its web pages.
_COPIED = "/srv/copied"

#: Files to copy by default, and bytes of each.
_FILES, _SIZE = 64, 131_072


class _Step(NamedTuple):
    step: str
    ok: bool
    result: str


def show(device: Device, accel: Accelerator, folder: Path | None, as_json: bool) -> None:
    """Boot a guest, copy ``folder`` in and out, fetch a page from it, and print the report.

    Raises CliError if the guest cannot be made or does not answer.
    """
    from ...testing import PrivateFabric

    require_qmp()
    if folder is not None and not folder.is_dir():
        raise click.UsageError(f"--copy {folder}: no such folder")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vsock-demo-") as scratch, PrivateFabric() as fabric:
        command = _prepare(Path(scratch), device, accel)
        steps = [_Step("make a guest", True, f"in {time.monotonic() - began:.1f} s")]
        with _booted(command, fabric, Path(scratch)) as (guest, booted):
            steps += [booted, _look_around(guest)]
            steps += _copy(guest, folder, Path(scratch), show=not as_json)
            with _forwarded(fabric, guest.cid) as url:
                steps.append(_fetch(url, guest.cid))
                _report(steps, as_json)
                if not as_json and sys.stdin.isatty() and sys.stdout.isatty():
                    notice(f"the guest's page is at {url} until you leave its shell (exit)")
                    _shell(guest)
    if not all(step.ok for step in steps):
        raise click.exceptions.Exit(1)


def _report(steps: list[_Step], as_json: bool) -> None:
    if as_json:
        print_json({"ok": all(s.ok for s in steps), "steps": [s._asdict() for s in steps]})
        return
    rows = ((s.step, "ok" if s.ok else "FAILED", s.result) for s in steps)
    print_table([Column("STEP"), Column(""), Column("RESULT", whole=False)], rows)


# Build the guest


def _prepare(scratch: Path, device: Device, accel: Accelerator) -> list[str]:
    """Return the arguments for ``vsock vm run``."""
    from ...vm import apt, guest_image

    accelerators(accel)  # fails before anything is downloaded
    notice("QEMU, a kernel, busybox and Python (downloaded the first time)")
    qemu = find_qemu(device, None, download=True)
    try:
        suite = apt.system_suite()
        kernel, userland = guest_image.KernelImage(suite), guest_image.Userland(suite)
        archive = guest_image.build_initramfs(
            kernel, userland, device.value, _LAST.format(python=userland.python)
        )
    except apt.Unavailable as error:
        raise CliError(str(error)) from None
    initrd = scratch / "initrd"
    initrd.write_bytes(archive)
    boot = ["--kernel", str(kernel.image), "--initrd", str(initrd), "--append"]
    boot.append(guest_image.COMMAND_LINE)
    # A panic resets the machine, which then ends.
    extra = ["--", "-no-reboot"]
    return ["--qemu", qemu, "--device", device.value, "--accel", accel.value, *boot, *extra]


@contextlib.contextmanager
def _running(
    fabric: PrivateFabric, *command: str, **streams: Any
) -> Iterator[subprocess.Popen[str]]:
    """Run a ``vsock`` command on the demo's fabric during the with block."""
    program = (sys.executable, "-m", "vsockets.cli", "--dir", os.fspath(fabric.folder))
    process = subprocess.Popen(
        [*program, *command],
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C reaches this process only, which ends it
        **streams,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_PATIENCE)
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _booted(
    command: list[str], fabric: PrivateFabric, scratch: Path
) -> Iterator[tuple[GuestClient, _Step]]:
    """Run the guest; yield a client of it once it replies, and the step of the report."""
    from ...vm.guest_client import GuestClient

    cid = fabric.control.add_context(name="demo")["cid"]
    console = scratch / "console"
    with (
        open(console, "wb") as output,
        _running(
            fabric,
            *("vm", "run", "--cid", str(cid), "--grace", "0", *command),
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        guest = GuestClient(fabric.host, cid)
        began = time.monotonic()

        def version_of_guest() -> str:
            if process.poll() is not None:
                raise CliError(f"the guest has ended: {_end_of_console(console)}")
            return guest.run("uname", "-r").strip()

        try:
            version = keep_trying(version_of_guest, _BOOT, _NOT_YET)
            result = f"Linux {version} in {time.monotonic() - began:.1f} s"
            yield guest, _Step("boot it", bool(version), result)
        except OSError as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_SECONDS)
            what = "has ended" if process.poll() is not None else f"does not reply ({error})"
            raise CliError(f"the guest {what}: {_end_of_console(console)}") from None


def _end_of_console(console: Path) -> str:
    """Return the console's last lines, or those up to a kernel panic, without control sequences."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1bc", "", console.read_text(errors="replace"))
    lines = ["".join(filter(str.isprintable, line)) for line in text.splitlines()]
    lines = [line for line in lines if line.strip()]
    for number, line in enumerate(lines):
        if "Kernel panic" in line:
            del lines[number + 1 :]
            break
    return "".join(f"\n    {line}" for line in lines[-_LINES:]) or "no output"


# Use the guest


def _look_around(guest: GuestClient) -> _Step:
    """Run a command in the guest that lists its network cards."""
    interfaces = guest.run("ls", "/sys/class/net").split()
    others = [name for name in interfaces if name != "lo"]
    result = f"no network card, only {', '.join(interfaces)}"
    return _Step("run a program in the guest", not others, result)


def _copy(guest: GuestClient, folder: Path | None, scratch: Path, show: bool) -> Iterator[_Step]:
    from ...vm.guest_client import digest, files_below

    source = folder or _make_files(scratch / "files")
    sizes = [path.stat().st_size for path in files_below(source)]
    amount = f"{len(sizes)} files, {sum(sizes) / 1e6:.1f} MB"
    wanted = digest(source)

    def step(title: str, began: float, found: str) -> _Step:
        intact = found == wanted
        digests = f"sha256 {wanted[:12]}… at both ends" if intact else "not the same at both ends"
        return _Step(title, intact, f"{amount} in {time.monotonic() - began:.1f} s, {digests}")

    began = time.monotonic()
    with progress("into the guest", sum(sizes), show, "DownloadColumn") as advance:
        guest.copy_in(source, _COPIED, advance)
    yield step("copy a folder in", began, guest.digest(_COPIED))
    began = time.monotonic()
    with progress("out of the guest", sum(sizes), show, "DownloadColumn") as advance:
        guest.copy_out(_COPIED, scratch / "back", advance, sum(sizes))
    yield step("copy it out again", began, digest(scratch / "back"))


def _make_files(folder: Path) -> Path:
    for number in range(_FILES):
        path = folder / f"folder {number % 8}" / f"file {number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(_SIZE))
    return folder


@contextlib.contextmanager
def _forwarded(fabric: PrivateFabric, cid: int) -> Iterator[str]:
    """Forward a local port to the guest's web server, and yield its URL."""
    from ...vm.guest_agent import PAGE_PORT

    ends = ("tcp:127.0.0.1:0", f"vsock:{cid}:{PAGE_PORT}")
    with _running(fabric, "forward", *ends, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        readable, _, _ = select.select([process.stderr], [], [], _PATIENCE)
        line = process.stderr.readline().strip() if readable else "no output"
        _, found, address = line.partition("listening on tcp:")
        if not found:
            raise CliError(f"vsock forward: {line.removeprefix('vsock: ')}")
        yield f"http://{address}/"


def _fetch(url: str, cid: int) -> _Step:
    with urllib.request.urlopen(url, timeout=_PATIENCE) as answer:
        page = answer.read(65_536).decode(errors="replace")
    ok = f"Context {cid}" in page
    return _Step(
        "fetch a page of the guest", ok, f"{url}: {len(page)} characters, of context {cid}"
    )


def _shell(guest: GuestClient) -> None:
    """Run a shell in the guest on this terminal."""
    from ...vm.machine import console

    size = os.get_terminal_size()
    with guest.start("sh", size=size) as sock:
        sock.settimeout(None)
        with console(sock, lambda: sock.shutdown(socket.SHUT_RDWR)) as finish:
            finish()
