"""The context that a process belongs to: one of the fabric's, or the kernel's AF_VSOCK.

A process reaches a context of the fabric by the folder of the context's control sockets.  The
kernel's AF_VSOCK connects to the host in a virtual machine, over the device that the hypervisor
offers (VMCI, virtio, Hyper-V), and to the guests on a host with vhost-vsock or VMware's modules.
"""

from __future__ import annotations

import _socket
import array
import errno
import fcntl
import functools
import os
import select
import socket
from collections.abc import Sequence
from pathlib import Path

from ._linux.sockets import DESCRIPTOR_SPACE, descriptor_in, with_descriptor
from .limits import VSOCKD_REPLY_TIMEOUT_SECONDS
from .model.constants import AF_VSOCK, VMADDR_CID_ANY, VMADDR_CID_HOST, VMADDR_CID_LOCAL
from .protocol import RECORD_SIZE, Record, client
from .state_folder import (
    SEQPACKET,
    STREAM,
    connect_to,
    default_folder,
    how_to_start,
    is_short,
    require_private,
    wait_to_connect,
)

# The methods of the C class, without the overrides of subclasses.
_connect, _set_blocking = _socket.socket.connect, _socket.socket.setblocking
_sendmsg, _recvmsg = _socket.socket.sendmsg, _socket.socket.recvmsg
_poll, _POLLIN = select.poll, select.POLLIN
_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)
#: The longest timeout of poll(2), an ``int`` of milliseconds: 24 days.
_LONGEST_POLL = 0x7FFF_FFFF

#: The mount point of the context's folder in a container that is a guest.
SELF = Path("/run/vsock/self")

#: The ioctl of the device node that returns the local CID (``linux/vm_sockets.h``).
_IOCTL_GET_LOCAL_CID = 0x7B9
_DEVICE = "/dev/vsock"


class Attachment:
    """A context of the fabric, identified by the folder of its control sockets.

    ``folder`` may also be the path of one of these sockets.  With ``on_demand``, vsockd is started
    if it is not running; only the user's own fabric allows that.
    """

    transport = "fabric"

    def __init__(self, folder: str | os.PathLike[str], on_demand: bool = False) -> None:
        path = Path(folder)
        self.folder = path.parent if path.name in (STREAM, SEQPACKET) else path
        self._on_demand = on_demand
        self._control_sockets = {
            int(socket.SOCK_STREAM): os.fspath(self.folder / STREAM),
            int(socket.SOCK_SEQPACKET): os.fspath(self.folder / SEQPACKET),
        }
        self._are_short = all(map(is_short, self._control_sockets.values()))

    def __repr__(self) -> str:
        return f"<attachment to {self.folder}>"

    def open_channel(self, sock: _socket.socket, kind: int, seconds: float = 0.0) -> float:
        """Connect ``sock``, a unix socket of type ``kind``, to the control socket of that type.

        Waits up to ``seconds`` while vsockd's backlog is full, and returns the remaining seconds.

        Raises OSError: ETIMEDOUT, or ENOBUFS if ``seconds`` is 0; ENODEV if vsockd is not running.
        """
        path = self._control_sockets[kind]
        # A blocking connect(2) would wait without a limit.
        blocks = seconds and sock.gettimeout() is None
        if blocks:
            _set_blocking(sock, False)
        try:
            if self._are_short:
                _connect(sock, path)
            else:
                connect_to(functools.partial(_connect, sock), path)
        except (FileNotFoundError, ConnectionRefusedError):
            if not self._on_demand:
                start = "on the host" if self.folder == SELF else how_to_start(self.folder.parent)
                raise OSError(
                    errno.ENODEV, f"vsockd is not running in {self.folder} (start it: {start})"
                ) from None
            from . import launcher  # imported here, because few programs need it

            launcher.start(self.folder.parent)
            connect_to(functools.partial(_connect, sock), path)
        except BlockingIOError:
            return wait_to_connect(sock, path, seconds)
        finally:
            if blocks:
                _set_blocking(sock, True)
        return seconds

    def request(self, data: bytes, fd: int | None = None) -> tuple[Record, int | None]:
        """Send a request, with the descriptor ``fd`` if given, on a new connection to vsockd.

        Returns the reply and the descriptor received with it.

        Raises OSError with the errno that vsockd replied, or ETIMEDOUT.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(VSOCKD_REPLY_TIMEOUT_SECONDS)
            left = self.open_channel(sock, socket.SOCK_SEQPACKET, VSOCKD_REPLY_TIMEOUT_SECONDS)
            if left < VSOCKD_REPLY_TIMEOUT_SECONDS:
                sock.settimeout(left)
            ancillary = [] if fd is None else [with_descriptor(fd)]
            try:
                send_request(sock, data, ancillary)
            except OSError as error:
                if error.errno != errno.ETOOMANYREFS:
                    raise
                reason = "the user has too many descriptors in flight"
                raise OSError(errno.ENOBUFS, reason) from None
            return receive_reply(sock, _CLOEXEC)

    @functools.cached_property
    def cid(self) -> int:
        """The CID of the context."""
        return self.request(client.local_cid())[0].local_cid

    def is_trusted(self, sock_type: int, peer_cid: int = VMADDR_CID_HOST, cookie: int = 0) -> bool:
        """Return whether this process's sockets of type ``sock_type`` are trusted (guide page 24).

        Trust in a program of the host depends on the guest, ``peer_cid``.  With a ``cookie``
        (SO_COOKIE), the result is the trust that was decided when that socket was bound.
        """
        record, _ = self.request(client.local_cid(peer_cid, cookie=cookie))
        return record.is_trusted(datagram=sock_type == socket.SOCK_DGRAM)


def send_request(
    sock: _socket.socket,
    data: bytes,
    ancillary: Sequence[tuple[int, int, bytes]] = (),
    flags: int = 0,
) -> None:
    """Send a request on a connection to vsockd.

    EPIPE is ignored: vsockd has refused the connection before it received the request, has replied
    and has closed the connection.  :func:`receive_reply` returns that reply.

    Raises OSError for other errors.
    """
    try:
        _sendmsg(sock, (data,), ancillary, flags)
    except BrokenPipeError:
        return


def receive_reply(sock: _socket.socket, flags: int) -> tuple[Record, int | None]:
    """Return vsockd's reply on a connection, and the descriptor received with it.

    Raises OSError as :func:`vsockets.protocol.client.decode_reply` does.
    """
    try:
        data, came, _, _ = _recvmsg(sock, RECORD_SIZE, DESCRIPTOR_SPACE, flags)
    except ConnectionResetError:
        # vsockd closed the connection before it received the request.  A packet socket reports
        # that first; vsockd's reply is still in the queue.
        data, came, _, _ = _recvmsg(sock, RECORD_SIZE, DESCRIPTOR_SPACE, flags)
    return client.decode_reply(data), descriptor_in(came)


class KernelContext:
    """The kernel's AF_VSOCK as a context, with the interface of :class:`vsockets.Attachment`."""

    transport = "kernel"

    def __repr__(self) -> str:
        return "<the kernel's AF_VSOCK>"

    @property
    def cid(self) -> int:
        """The machine's CID, read at each access because a migration may change it.

        Raises OSError(ENODEV) if this kernel has no AF_VSOCK.
        """
        cid = local_cid()
        if cid is None:
            raise OSError(
                errno.ENODEV, f"AF_VSOCK is missing in this kernel: no CID from {_DEVICE}"
            )
        return cid

    def is_trusted(self, sock_type: int, peer_cid: int = VMADDR_CID_HOST, cookie: int = 0) -> bool:
        """Return whether the kernel trusts this process's sockets (CAP_NET_ADMIN)."""
        with socket.socket(AF_VSOCK, sock_type) as sock:
            return bool(sock.getsockopt(AF_VSOCK, 5))


def local_cid() -> int | None:
    """Return the CID of the kernel's AF_VSOCK, or None if this kernel has no AF_VSOCK."""
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
    """Return whether the kernel's AF_VSOCK can connect to other machines, not only to itself."""
    return local_cid() not in (None, VMADDR_CID_ANY, VMADDR_CID_LOCAL)


#: The errors of a connect whose peer does not exist or cannot be reached.
_UNREACHABLE = frozenset(
    {
        *(errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH),
        *(errno.ENETDOWN, errno.ENODEV, errno.ETIMEDOUT),
    }
)

#: The context of a socket: one of the fabric, or that of the machine's own kernel.
ContextHandle = Attachment | KernelContext


def wait_readable(fd: int, seconds: float | None) -> bool:
    """Wait up to ``seconds`` for ``fd``; return whether it is readable."""
    poll = _poll()
    poll.register(fd, _POLLIN)
    return bool(poll.poll(None if seconds is None else min(seconds * 1000, _LONGEST_POLL)))


def explain(failure: OSError, handle: ContextHandle) -> None:
    """Add a note that names the transport to ``failure``, the exception of a connect.

    A note is added only if the peer is unreachable and the transport was chosen automatically,
    because the choice may be the reason.
    """
    if failure.errno not in _UNREACHABLE or os.environ.get("VSOCKETS_TRANSPORT", "auto") != "auto":
        return
    if handle is not current():  # chosen by the program
        return
    if isinstance(handle, KernelContext):
        chosen = "the kernel's AF_VSOCK, which has a CID here (for the fabric: vsock run, or "
        chosen += "VSOCKETS_TRANSPORT=fabric)"
    else:
        if os.environ.get("VSOCKETS_CONTEXT"):
            why = "from VSOCKETS_CONTEXT"
        elif handle.folder == SELF:
            why = "which is mounted here"
        else:
            why = "because the kernel's AF_VSOCK has no transport"
        chosen = f"the fabric, {handle.folder}, {why}"
    note = f"VSOCKETS_TRANSPORT is auto; chosen: {chosen}"
    if note not in getattr(failure, "__notes__", ()):
        failure.add_note(note)


def assigned() -> Attachment | None:
    """Return the context that is assigned to this process, or None.

    The context is named by ``VSOCKETS_CONTEXT``, or its folder is mounted at :data:`SELF`.
    """
    configured = os.environ.get("VSOCKETS_CONTEXT")
    if configured:
        return Attachment(configured)
    return Attachment(SELF) if SELF.is_dir() else None


@functools.cache
def current() -> ContextHandle:
    """Return the context that this process belongs to.

    The first of: ``VSOCKETS_CONTEXT``; the folder mounted at ``/run/vsock/self``; the kernel's
    AF_VSOCK if it has a transport; the host of the user's own fabric, which is started when it is
    first used.  ``VSOCKETS_TRANSPORT`` limits the choice to ``fabric`` or ``kernel``.
    """
    transport = os.environ.get("VSOCKETS_TRANSPORT", "auto")
    if transport not in ("fabric", "kernel", "auto"):
        raise OSError(
            errno.EAFNOSUPPORT,
            f"VSOCKETS_TRANSPORT={transport}: unknown transport (expected fabric, kernel or auto)",
        )
    if transport == "kernel":
        return KernelContext()
    if place := assigned():
        return place
    if transport == "auto" and has_transport():
        return KernelContext()
    folder = default_folder()
    if folder.exists():
        require_private(folder)
    return Attachment(folder / str(VMADDR_CID_HOST), on_demand=True)
