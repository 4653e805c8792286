"""The kernel's own AF_VSOCK, as the context a process is in.

In a virtual machine it leads to the host, over whatever device the hypervisor offers (VMCI,
virtio, Hyper-V); on a host with vhost-vsock or VMware's modules, to the guests.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket as stdlib

from .model.constants import AF_VSOCK, VMADDR_CID_ANY, VMADDR_CID_HOST, VMADDR_CID_LOCAL

#: ``linux/vm_sockets.h``: the local CID, from the device node.
_IOCTL_GET_LOCAL_CID = 0x7B9
_DEVICE = "/dev/vsock"


class KernelContext:
    """What :class:`vsockets.Attachment` is for the fabric."""

    transport = "kernel"

    def __repr__(self) -> str:
        return "<the kernel's AF_VSOCK>"

    @property
    def cid(self) -> int:
        """The machine's CID, which may change under it (migration).

        OSError ENODEV when there is no AF_VSOCK in this kernel.
        """
        cid = local_cid()
        if cid is None:
            raise OSError(errno.ENODEV, f"this kernel has no AF_VSOCK ({_DEVICE} does not answer)")
        return cid

    def is_trusted(self, sock_type: int, peer_cid: int = VMADDR_CID_HOST, cookie: int = 0) -> bool:
        """Whether this process's sockets are trusted: CAP_NET_ADMIN, says the kernel."""
        with stdlib.socket(AF_VSOCK, sock_type) as sock:
            return bool(sock.getsockopt(AF_VSOCK, 5))


def local_cid() -> int | None:
    """The CID the kernel's AF_VSOCK has, or None."""
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
    """Whether the kernel's AF_VSOCK reaches anybody but this machine's own processes."""
    return local_cid() not in (None, VMADDR_CID_ANY, VMADDR_CID_LOCAL)
