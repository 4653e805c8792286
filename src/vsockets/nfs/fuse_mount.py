"""A mounted export, which serves the kernel's FUSE requests until it is unmounted."""

from __future__ import annotations

import asyncio
import errno
import importlib
import logging
import os

import pyfuse3

from ..attachment import ContextHandle
from ..eventloop.service import run_service
from ..logs import NOTICE
from ..model.locator import Inet, Locator
from .fuse import NfsOperations
from .limits import NFS_CALL_TIMEOUT_SECONDS, NFS_NO_REPLY_WARNING_SECONDS
from .nfs3 import DATA_SIZE, UDP_DATA_SIZE
from .nfs_client import NfsClient, credentials, mount_export
from .rpc_client import RpcClient

log = logging.getLogger("vsockets.nfs")


def mount(
    server: Locator,
    export: str,
    folder: str,
    context: ContextHandle | None = None,
    mount_server: Locator | None = None,
    transfer: int = DATA_SIZE,
) -> None:
    """Mount an export on ``folder``; return when it is unmounted, or at SIGTERM or SIGINT.

    ``mount_server`` serves the MOUNT protocol if ``server`` does not.  ``transfer`` is the maximum
    size of a READ or WRITE in bytes.

    Raises OSError if the export cannot be mounted; :mod:`.preflight` checks the requirements.
    """
    if not os.path.isdir(folder):
        raise OSError(errno.ENOENT, f"{folder}: directory not found")
    try:
        asyncio.run(_serve(server, mount_server or server, export, folder, transfer, context))
    except OSError as error:
        raise OSError(error.errno, f"{export}: {error.strerror or error}") from None


async def _serve(
    server: Locator,
    mount_server: Locator,
    export: str,
    folder: str,
    transfer: int,
    context: ContextHandle | None,
) -> None:
    _enable_asyncio()
    client = RpcClient.connect(mount_server, context)

    def warn() -> None:
        hint = f" ({client.send_error}: is there a server?)" if client.send_error else ""
        log.warning(
            "%s does not answer yet%s; trying for %g s",
            mount_server,
            hint,
            NFS_CALL_TIMEOUT_SECONDS,
        )

    try:
        timer = asyncio.get_running_loop().call_later(NFS_NO_REPLY_WARNING_SECONDS, warn)
        root = await mount_export(client, os.fsencode(export))
        timer.cancel()
        if server != mount_server:
            client.close()
            client = RpcClient.connect(server, context)
        if isinstance(server, Inet):
            transfer = min(transfer, UDP_DATA_SIZE)
        nfs = NfsClient(client, transfer)
        await nfs.negotiate(credentials(os.geteuid(), os.getegid()), root)
        options = set(pyfuse3.default_options) | {f"fsname={server}", "subtype=vsock-nfs"}
        if os.geteuid() == 0:
            options.add("allow_other")
        try:
            pyfuse3.init(NfsOperations(nfs, root), folder, options)
        except RuntimeError as error:  # fusermount has printed its error on standard error
            raise OSError(f"{folder}: {error}") from None
        try:
            serving = asyncio.ensure_future(pyfuse3.main())

            async def unmount() -> None:
                pyfuse3.terminate()
                await serving

            await run_service(
                lambda: log.log(NOTICE, "mounted on %s", folder), serving, drain=unmount
            )
        finally:
            pyfuse3.close()
    finally:
        client.close()


def _enable_asyncio() -> None:
    """Switch pyfuse3 to asyncio; the module depends on its version."""
    try:
        module = importlib.import_module("pyfuse3.asyncio")
    except ImportError:  # before 3.4, as in Debian 12
        module = importlib.import_module("pyfuse3_asyncio")
    module.enable()
