"""The kernel's own AF_VSOCK as the context of a process.

In a virtual machine it connects to the host, over the device that the hypervisor offers (VMCI,
virtio, Hyper-V); on a host with vhost-vsock or VMware's modules, to the guests.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket as stdlib

from .model.constants import AF_VSOCK, VMADDR_CID_ANY, VMADDR_CID_HOST, VMADDR_CID_LOCAL

#: The ioctl of the device node that returns the local CID (``linux/vm_sockets.h``).
_IOCTL_GET_LOCAL_CID = 0x7B9
_DEVICE = "/dev/vsock"


class KernelContext:
    """The kernel's counterpart of :class:`vsockets.Attachment`."""

    transport = "kernel"

    def __repr__(self) -> str:
        return "<the kernel's AF_VSOCK>"

    @property
    def cid(self) -> int:
        """The machine's CID, which a migration may change.

        Raises OSError ENODEV if this kernel has no AF_VSOCK.
        """
        cid = local_cid()
        if cid is None:
            raise OSError(
                errno.ENODEV, f"AF_VSOCK is missing in this kernel: no CID from {_DEVICE}"
            )
        return cid

    def is_trusted(self, sock_type: int, peer_cid: int = VMADDR_CID_HOST, cookie: int = 0) -> bool:
        """Return whether the kernel trusts this process's sockets (CAP_NET_ADMIN)."""
        with stdlib.socket(AF_VSOCK, sock_type) as sock:
            return bool(sock.getsockopt(AF_VSOCK, 5))


def local_cid() -> int | None:
    """Return the CID of the kernel's AF_VSOCK, or None."""
    try:
        device = os.open(_DEVICE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        answer = array.array("I", [0])
        fcntl.ioctl(device, _IOCTL_GET_LOCAL_CID, answer)
        return answer[0]
    except OSError:
        return None
    finally:
        os.close(device)


def has_transport() -> bool:
    """Return whether the kernel's AF_VSOCK reaches more than this machine's own processes."""
    return local_cid() not in (None, VMADDR_CID_ANY, VMADDR_CID_LOCAL)
