"""``vsock nfs``: share folders of the host with guests over datagrams."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import logs
from ..model.constants import VMADDR_CID_HOST
from ..model.locator import Inet, Locator, Vsock
from .connect import lasting_context
from .groups import group
from .options import (
    address_option,
    argument,
    configure_log,
    count_option,
    log_format_option,
    parser_of,
    path_argument,
    path_option,
    read_locator,
    state_file,
    verbose_option,
)

if TYPE_CHECKING:
    # Imported late, in functions: these take longer than most commands.
    from ..nfs.server import NfsServer

#: NFS's port of UDP, used for vSockets, too.
PORT = 2049


@group("nfs")
def nfs() -> None:
    """Share folders of the host with guests over datagrams."""


@parser_of
def _read_export(text: str) -> Any:
    from ..nfs.exports import Export

    return Export.parse(text)


@nfs.command("serve")
@click.option(
    "--export",
    type=_read_export,
    multiple=True,
    required=True,
    metavar="DIR[,ro][,cid=CID:…][,no-root-squash]",
    help="Folder to export, its options, and the guests that may mount it; repeatable.",
)
@address_option(
    "--listen",
    multiple=True,
    help=f"Address to serve at, vsock-dgram: or udp:; repeatable. "
    f"Default: vsock-dgram:{VMADDR_CID_HOST}:{PORT}.",
)
@path_option(
    "--state",
    metavar="FILE",
    help="State file that keeps file handles valid across restarts. "
    "Default: vsock/nfs in XDG_STATE_HOME or ~/.local/state.",
)
@verbose_option
@log_format_option
def serve(
    export: tuple[Any, ...],
    listen: tuple[Locator, ...],
    state: Path | None,
    verbose: bool,
    log_format: str,
) -> None:
    """Serve folders by NFS version 3, with the MOUNT protocol on the same port."""
    from .._linux.process import allow_many_descriptors
    from ..eventloop.replacement import take_over
    from ..nfs import server
    from ..nfs.handles import HandleStore
    from ..nfs.nfs3 import DATA_SIZE, UDP_DATA_SIZE
    from ..nfs.service import NfsService

    addresses = list(listen) or [Vsock(VMADDR_CID_HOST, PORT, datagram=True)]
    for locator in addresses:
        _expect(locator, "--listen")
    configure_log(verbose, log_format)
    log = logging.getLogger("vsockets.nfs")

    def opened(server: NfsServer) -> None:
        for listener, locator in zip(server.listeners, addresses, strict=True):
            scheme = str(locator).partition(":")[0]
            log.log(logs.NOTICE, "listening on %s:%s", scheme, listener.where)

    context = lasting_context(any(isinstance(locator, Vsock) for locator in addresses))
    allow_many_descriptors()  # each export keeps some hundred descriptors open
    with contextlib.ExitStack() as stack:
        take_over()  # a predecessor has the state file open
        handles = stack.enter_context(contextlib.closing(HandleStore(state or state_file("nfs"))))
        over_udp = any(isinstance(locator, Inet) for locator in addresses)
        size = UDP_DATA_SIZE if over_udp else DATA_SIZE
        service = NfsService(list(export), handles, size)
        stack.callback(service.close)
        asyncio.run(server.serve(service, addresses, context, opened, stack.close))


@nfs.command("mount")
@argument(
    "server",
    type=read_locator,
    metavar="SERVER",
    help="Address of the server, vsock-dgram: or udp:.",
)
@argument("export", metavar="EXPORT", help="Folder of the server to mount.")
@path_argument("folder", metavar="FOLDER", help="Folder to mount it on.")
@address_option("--mount-server", help="Address of the MOUNT protocol. Default: SERVER.")
@count_option(
    "--transfer-size",
    min=512,
    max=65_536,
    default=65_536,
    metavar="BYTES",
    help="Largest READ or WRITE, in bytes; 32768 if UDP is used anywhere on the way.",
)
def mount(server: Any, export: str, folder: Path, mount_server: Any, transfer_size: int) -> None:
    """Mount a server's folder until it is unmounted or this command is ended."""
    from ..nfs import preflight

    _expect(server, "SERVER")
    if mount_server is not None:
        _expect(mount_server, "--mount-server")
    configure_log()
    context = lasting_context() if isinstance(server, Vsock) else None
    preflight.check()
    from ..nfs.fuse_mount import mount as serve_folder

    serve_folder(server, export, os.fspath(folder), context, mount_server, transfer_size)


def _expect(locator: Locator, name: str) -> None:
    if not isinstance(locator, Vsock | Inet) or not locator.datagram:
        raise click.UsageError(f"{name} {locator}: expected vsock-dgram: or udp:")
