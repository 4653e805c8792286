"""Replacement of a crashed virtio device in a running virtual machine.

QEMU connects to a vhost-user-vsock device's process when the device is plugged in, and never again.
So the device is unplugged and another one plugged in, which the guest's driver takes: its streams
end with ECONNRESET, its listeners stay.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from qemu.qmp import ExecuteError, QMPClient

from .qemu_args import VIRTIO_DEVICE

#: Seconds after which the user learns that the guest has not released the device yet.  A guest does
#: so in a second, but not while it is paused, or before its kernel runs.
_RELEASE_SECONDS = 30.0

#: Seconds between attempts to remove the socket of a device that QEMU has not freed yet.
_FREE_SECONDS = 0.05


async def replug(qmp: QMPClient, path: str, report: Callable[[str], None]) -> None:
    """Unplug the virtio device, and plug in one whose process listens at ``path``.

    Waits without a limit until the guest has released the device; ``report`` gets a line then.

    Raises ExecuteError if QEMU refuses, for instance because the process has ended.
    """
    device, chardev = VIRTIO_DEVICE["id"], VIRTIO_DEVICE["chardev"]
    with qmp.listener("DEVICE_DELETED") as listener:
        if await _has(qmp, device):
            with contextlib.suppress(ExecuteError):  # an earlier request is under way
                await qmp.execute("device_del", {"id": device})
            late = asyncio.get_running_loop().call_later(
                _RELEASE_SECONDS, report, "the guest has not released the device yet"
            )
            try:
                while await _has(qmp, device):
                    await listener.get()
            finally:
                late.cancel()
    while any(one["label"] == chardev for one in await _list(qmp, "query-chardev")):
        try:
            await qmp.execute("chardev-remove", {"id": chardev})
        except ExecuteError:
            await asyncio.sleep(_FREE_SECONDS)
    address = {"type": "unix", "data": {"path": path}}
    backend = {"type": "socket", "data": {"addr": address, "server": False}}
    await qmp.execute("chardev-add", {"id": chardev, "backend": backend})
    await qmp.execute("device_add", dict(VIRTIO_DEVICE))


async def _has(qmp: QMPClient, device: str) -> bool:
    found = await _list(qmp, "qom-list", {"path": "/machine/peripheral"})
    return any(one["name"] == device for one in found)


async def _list(
    qmp: QMPClient, command: str, arguments: dict[str, object] | None = None
) -> list[Any]:
    result = await qmp.execute(command, arguments)
    assert isinstance(result, list)
    return result
