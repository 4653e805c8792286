"""``vsock capture``: what passes a device or a forwarder, for Wireshark and its kin."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from ..attachment import Attachment
from ..limits import CAPTURE_PAYLOAD_MAX_BYTES
from ..model.address import parse_port
from ..model.constants import VMADDR_PORT_ANY
from ..model.locator import Vsock
from .connect import own_context
from .errors import CliError, cli_error
from .forward import serve
from .options import (
    AllowOption,
    SourceArgument,
    TargetArgument,
    VerboseOption,
    parser_of,
    read_cid,
)
from .output import notice

_CAPTURE = {
    errno.EACCES: "it is for the fabric's owner, root, and who has a grant: docs/capture.md",
    errno.ENOENT: "there is no such context",
    errno.ENOTSUP: "it has no device: what passes between processes no device sees; see --help",
}


def capture(
    file: Annotated[
        Path, typer.Option("-w", "--write", metavar="FILE", help="- is standard output.")
    ],
    source: SourceArgument = None,
    target: TargetArgument = None,
    context: Annotated[
        int | None,
        typer.Option(parser=read_cid, metavar="CID", help="Record at this machine's device."),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            parser=parser_of(parse_port),
            metavar="PORT",
            help="With --context: only from or to this port.",
        ),
    ] = None,
    payload: Annotated[
        int,
        typer.Option(
            "-s",
            "--payload",
            metavar="BYTES",
            min=0,
            max=CAPTURE_PAYLOAD_MAX_BYTES,
            help="Keep so much of what is in one record; 0 keeps addresses and times only.",
        ),
    ] = CAPTURE_PAYLOAD_MAX_BYTES,
    allow: AllowOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Record what passes a virtual machine's device, or a forwarder, as pcap.

    With --context what the machine says and is told, until Ctrl-C or its end.  A reader that is
    slow misses some of it, and is told how much; the machine does not wait for it.

    Between processes nothing is in between.  With FROM and TO whoever comes to FROM is forwarded
    to TO, as by vsock forward, and recorded; one of the two is a vSockets address.  To see what a
    guest says to port 5000, let the service listen on 5001 and capture with vsock::5000
    vsock:host:5001.
    """
    if context is not None:
        if source is not None or allow:
            raise typer.BadParameter("FROM, TO and --allow do not go with --context")
        _capture_device(context, VMADDR_PORT_ANY if port is None else port, payload, file)
        return
    if source is None or target is None or port is not None:
        raise typer.BadParameter("expected --context CID, or FROM and TO without --port")
    _capture_forwarder(source, target, allow, payload, file, verbose)


def _capture_device(cid: int, port: int, payload: int, file: Path) -> None:
    from ..capture.recording import open_capture, write_capture

    place = own_context()
    if not isinstance(place, Attachment):
        raise CliError("devices are the host's: there are none in a virtual machine")
    try:
        records = open_capture(place, cid, payload, port)
    except OSError as error:
        raise cli_error(f"capture of context {cid}", error, _CAPTURE) from None
    with records, _open(file) as opened:
        notice(f"capturing what passes the device of context {cid}")
        counts = write_capture(records, opened)
    missed = f", {counts.missed} were missed" if counts.missed else ""
    notice(f"{counts.records} records{missed}")


def _capture_forwarder(
    source: Any, target: Any, allow: Any, payload: int, file: Path, verbose: bool
) -> None:
    from ..capture.recording import Recorder
    from ..forward.settings import Settings

    if not (isinstance(source, Vsock) or isinstance(target, Vsock)):
        raise typer.BadParameter("one of FROM and TO must be vsock: or vsock-dgram:")
    try:
        settings = Settings(source, target, allow=tuple(allow or ()))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if str(file) == "-" and settings.once and "stdio:" in (str(source), str(target)):
        raise typer.BadParameter("standard output cannot be both the capture and a stream")
    with _open(file) as opened:
        serve([settings], verbose=verbose, recorder=Recorder(opened, payload))


def _open(file: Path) -> BinaryIO:
    if str(file) == "-":
        return os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    try:
        # What passes may be secret: nobody else's to read.
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CliError(f"{file}: {error.strerror}") from None
    return os.fdopen(fd, "wb")
