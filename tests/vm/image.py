"""The initrd of the test guests: the product's guest with an agent that runs Python code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vsockets.vm import guest_image
from vsockets.vm.guest_image import KernelImage, Userland

from .downloads import userland

#: Modules for tests that load them: loopback between guest programs, a network card, and file
#: systems in user space.
LOOPBACK = ("vmw_vsock_virtio_transport_common", "vsock_loopback")
NETWORK = (
    *("virtio", "virtio_ring", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci"),
    *("failover", "net_failover", "virtio_net"),
)
FUSE = ("fuse",)

_AGENT = Path(__file__).with_name("agent.py")

_LAST = """\
stty -F /dev/ttyS1 raw -echo
exec {python} -u -S /agent.py </dev/ttyS1 >/dev/ttyS1 2>/dev/console
"""


def build(
    kernel: KernelImage,
    device: str,
    extra: Mapping[str, bytes] | None = None,
    world: Userland | None = None,
) -> bytes:
    """Return an initrd for ``kernel`` and ``device``, with ``extra`` programs by path.

    ``world`` is Debian 12's by default.
    """
    world = world or userland()
    files = {"agent.py": _AGENT.read_bytes(), **(extra or {})}
    last = _LAST.format(python=world.python)
    return guest_image.build_initramfs(
        kernel, world, device, last, files, (*LOOPBACK, *NETWORK, *FUSE)
    )
