"""``vsock nfs``: a host's folders for guests, over datagrams."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import logs
from ..model.constants import VMADDR_CID_HOST
from ..model.locator import Inet, Locator, Vsock
from .connect import lasting_context
from .errors import CliError
from .options import LogFormat, LogFormatOption, VerboseOption, parser_of, read_locator

if TYPE_CHECKING:
    # What is imported in functions below takes longer than the other commands do.
    from ..nfs.server import NfsServer

#: NFS's port: of UDP, and so of vSockets.
PORT = 2049

app = typer.Typer(help="A host's folders for guests, over datagrams.", no_args_is_help=True)


@parser_of
def _read_export(text: str) -> Any:
    from ..nfs.exports import Export

    return Export.parse(text)


@app.command("serve")
def serve(
    export: Annotated[
        list[Any],
        typer.Option(
            parser=_read_export,
            metavar="DIR[,ro][,cid=CID:…][,no-root-squash]",
            help="A folder, how, and for whom; repeatable.",
        ),
    ],
    listen: Annotated[
        list[Any] | None,
        typer.Option(parser=read_locator, metavar="ADDRESS", help="vsock-dgram: or udp:"),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where it keeps what makes handles outlive it."),
    ] = None,
    verbose: VerboseOption = False,
    log_format: LogFormatOption = LogFormat.TEXT,
) -> None:
    """Serve folders by NFS version 3, with the MOUNT protocol on the same port."""
    from .._linux.rlimit import allow_many_descriptors
    from ..nfs import server
    from ..nfs.handles import HandleStore
    from ..nfs.nfs3 import DATA_SIZE, UDP_DATA_SIZE
    from ..nfs.service import NfsService

    listen = listen or [Vsock(VMADDR_CID_HOST, PORT, datagram=True)]
    for locator in listen:
        _expect(locator, "--listen")
    logs.configure("vsock: %(message)s", logging.INFO if verbose else logs.NOTICE, log_format.value)
    log = logging.getLogger("vsockets.nfs")

    def opened(server: NfsServer) -> None:
        for door, locator in zip(server.listeners, listen, strict=True):
            scheme = str(locator).partition(":")[0]
            log.log(logs.NOTICE, "listening on %s:%s", scheme, door.where)

    context = lasting_context(any(isinstance(locator, Vsock) for locator in listen))
    try:
        allow_many_descriptors()  # each export keeps some hundred open
        places = HandleStore(state or _default_state())
        try:
            over_udp = any(isinstance(locator, Inet) for locator in listen)
            service = NfsService(export, places, UDP_DATA_SIZE if over_udp else DATA_SIZE)
            try:
                asyncio.run(server.serve(service, listen, context, opened))
            finally:
                service.close()
        finally:
            places.close()
    except OSError as error:
        raise CliError(error.strerror or str(error)) from None


@app.command("mount")
def mount(
    server: Annotated[
        Any, typer.Argument(parser=read_locator, metavar="SERVER", help="vsock-dgram: or udp:")
    ],
    export: Annotated[str, typer.Argument(metavar="EXPORT", help="The server's folder.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to mount it.")],
    mount_server: Annotated[
        Any,
        typer.Option(
            parser=read_locator, metavar="ADDRESS", help="The MOUNT protocol's, if elsewhere."
        ),
    ] = None,
    transfer_size: Annotated[
        int,
        typer.Option(
            min=512,
            max=65_536,
            help="Bytes of a READ or WRITE at most; 32768 if UDP is anywhere on the way.",
        ),
    ] = 65_536,
) -> None:
    """Mount a server's folder until it is unmounted, or this is ended."""
    from ..nfs import preflight

    _expect(server, "SERVER")
    if mount_server is not None:
        _expect(mount_server, "--mount-server")
    logs.configure("vsock: %(message)s", logs.NOTICE, LogFormat.TEXT.value)
    context = lasting_context() if isinstance(server, Vsock) else None
    try:
        preflight.check()
        from ..nfs.fuse_mount import mount as serve_folder

        serve_folder(server, export, os.fspath(folder), context, mount_server, transfer_size)
    except OSError as error:
        raise CliError(error.strerror or str(error)) from None


def _expect(locator: Locator, name: str) -> None:
    if not isinstance(locator, Vsock | Inet) or not locator.datagram:
        raise typer.BadParameter(f"{name} {locator}: expected vsock-dgram: or udp:")


def _default_state() -> Path:
    folder = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(folder, "vsock", "nfs")
