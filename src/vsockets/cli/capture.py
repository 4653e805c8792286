"""``vsock capture``: record a device's or a forwarder's traffic as pcap, for Wireshark."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

import click

from ..attachment import Attachment
from ..limits import CAPTURE_PAYLOAD_MAX_BYTES
from ..model.constants import VMADDR_PORT_ANY
from ..model.locator import Vsock
from .connect import own_context
from .errors import CliError, cli_error
from .forward import serve
from .groups import command
from .options import (
    allow_option,
    cid_option,
    count_option,
    path_option,
    read_port,
    source_argument,
    target_argument,
    verbose_option,
)
from .output import notice

_CAPTURE = {
    errno.EACCES: "only the fabric's owner, root and users with a grant may capture "
    "(docs/capture.md)",
    errno.ENOENT: "no such context",
    errno.ENOTSUP: "the context has no device, and traffic between processes passes none; see "
    "--help",
}


@command("capture")
@path_option(
    "-w",
    "--write",
    "file",
    required=True,
    metavar="FILE",
    help="File to write; - is standard output.",
)
@source_argument
@target_argument
@cid_option("--context", help="Record the traffic of this virtual machine's device.")
@click.option(
    "--port",
    type=read_port,
    metavar="PORT",
    help="With --context: record packets from or to this port only.",
)
@count_option(
    "-s",
    "--payload",
    min=0,
    max=CAPTURE_PAYLOAD_MAX_BYTES,
    default=CAPTURE_PAYLOAD_MAX_BYTES,
    metavar="BYTES",
    help="Payload kept of one record, in bytes; 0 keeps addresses and times only.",
)
@allow_option
@verbose_option
def capture(
    file: Path,
    source: Any,
    target: Any,
    context: int | None,
    port: int | None,
    payload: int,
    allow: tuple[Any, ...],
    verbose: bool,
) -> None:
    """Record the packets of a device or a forwarder as pcap.

    With --context: everything that the virtual machine's device sends and receives, until Ctrl-C
    or the device's end.  A slow reader loses records, and their number is recorded; the machine
    never waits for the reader.

    With FROM and TO: clients of FROM are forwarded to TO, as by vsock forward, and recorded;
    one of the two is a vSockets address.  This also records programs that vsockd connects
    directly.  To see what a guest sends to port 5000, let the service listen on 5001 and capture
    with vsock::5000 vsock:host:5001.
    """
    if context is not None:
        if source is not None or allow:
            raise click.UsageError("--context: not allowed with FROM, TO and --allow")
        _capture_device(context, VMADDR_PORT_ANY if port is None else port, payload, file)
        return
    if port is not None:
        raise click.UsageError("--port: not allowed without --context")
    if source is None or target is None:
        raise click.UsageError("FROM and TO: missing (expected both, or --context CID)")
    _capture_forwarder(source, target, allow, payload, file, verbose)


def _capture_device(cid: int, port: int, payload: int, file: Path) -> None:
    from ..capture import open_capture, write_capture

    place = own_context()
    if not isinstance(place, Attachment):
        raise CliError("run this on the host: a virtual machine has no devices to capture")
    try:
        records = open_capture(place, cid, payload, port)
    except OSError as error:
        raise cli_error(f"capture of context {cid}", error, _CAPTURE) from None
    with records, _open(file) as opened:
        notice(f"capturing at the device of context {cid}")
        counts = write_capture(records, opened)
    missed = f", {counts.missed} were lost" if counts.missed else ""
    notice(f"{counts.records} records{missed}")


def _capture_forwarder(
    source: Any, target: Any, allow: tuple[Any, ...], payload: int, file: Path, verbose: bool
) -> None:
    from ..capture import Recorder
    from ..forward.settings import Settings

    if not (isinstance(source, Vsock) or isinstance(target, Vsock)):
        raise click.UsageError("FROM and TO: expected vsock: or vsock-dgram: for one of them")
    try:
        settings = Settings(source, target, allow=allow)
    except ValueError as error:
        raise click.UsageError(f"FROM and TO: {error}") from None
    if str(file) == "-" and settings.once and "stdio:" in (str(source), str(target)):
        raise click.UsageError("-w -: standard output is used by stdio: (expected a file)")
    with _open(file) as opened:
        serve([settings], verbose=verbose, recorder=Recorder(opened, payload))


def _open(file: Path) -> BinaryIO:
    if str(file) == "-":
        return os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    try:
        # Only this user may read the file: the payload may be secret.
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CliError(f"{file}: {error.strerror}") from None
    return os.fdopen(fd, "wb")
