"""Mounting an export, and serving the kernel until it is unmounted."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

import pyfuse3
import pyfuse3.asyncio

from ...attachment import Place
from ...locator import Inet, Locator
from ...service_manager import notify_ready
from .calls import NfsClient, credentials, mount_export
from .client import RpcClient
from .fuse import Mounted
from .nfs3 import UDP_DATA_SIZE


async def mount_and_serve(
    server: Locator,
    mount_server: Locator,
    export: bytes,
    folder: str,
    transfer: int,
    context: Place | None,
    mounted: Callable[[], None],
) -> None:
    """Return when ``folder`` is unmounted, or at SIGTERM or SIGINT.  Raises OSError."""
    pyfuse3.asyncio.enable()
    client = RpcClient.connect(mount_server, context)
    try:
        root = await mount_export(client, export)
        if server != mount_server:
            client.close()
            client = RpcClient.connect(server, context)
        if isinstance(server, Inet):
            transfer = min(transfer, UDP_DATA_SIZE)
        nfs = NfsClient(client, transfer)
        await nfs.agree(credentials(os.geteuid(), os.getegid()), root)
        options = set(pyfuse3.default_options) | {f"fsname={server}", "subtype=vsock-nfs"}
        if os.geteuid() == 0:
            options.add("allow_other")
        try:
            pyfuse3.init(Mounted(nfs, root), folder, options)
        except RuntimeError as error:  # what fusermount said is on standard error
            raise OSError(f"{folder}: {error}") from None
        try:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, pyfuse3.terminate)
            mounted()
            notify_ready()
            await pyfuse3.main()
        finally:
            pyfuse3.close()
    finally:
        client.close()
