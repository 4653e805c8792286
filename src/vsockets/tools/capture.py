"""``vsock capture``: a forwarder that writes down what passes, for Wireshark and its kin."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from ..limits import CAPTURE_PAYLOAD
from ..locator import Vsock
from .advice import Failure
from .forward import serve
from .options import AllowOption, SourceArgument, TargetArgument, VerboseOption


def capture(
    source: SourceArgument,
    target: TargetArgument,
    file: Annotated[
        Path, typer.Option("-w", "--write", metavar="FILE", help="- is standard output.")
    ],
    payload: Annotated[
        int,
        typer.Option(
            "-s",
            "--payload",
            metavar="BYTES",
            min=0,
            max=CAPTURE_PAYLOAD,
            help="Keep so much of what is in one record; 0 keeps addresses and times only.",
        ),
    ] = CAPTURE_PAYLOAD,
    allow: AllowOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Forward whoever comes to FROM to TO, as vsock forward does, and record it as pcap.

    FROM or TO is a vSockets address.  To see what a guest says to port 5000, let the service
    listen on 5001 and capture with vsock::5000 vsock:host:5001.
    """
    from ..bridges.capture.recorder import Recorder
    from ..bridges.forward.settings import Settings

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
        raise Failure(f"{file}: {error.strerror}") from None
    return os.fdopen(fd, "wb")
