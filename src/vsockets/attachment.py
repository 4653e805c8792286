"""Being part of a context: the folder whose control sockets a process may use."""

from __future__ import annotations

import _socket
import errno
import functools
import os
import select
import socket
from pathlib import Path

from . import kernel_context
from ._linux.sockets import DESCRIPTOR_SPACE, descriptor_in, with_descriptor
from .kernel_context import KernelContext
from .limits import VSOCKD_REPLY_TIMEOUT_SECONDS
from .model.constants import VMADDR_CID_HOST
from .protocol import RECORD_SIZE, Record, client
from .state_folder import (
    SEQPACKET,
    STREAM,
    connect_to,
    default_folder,
    is_short,
    require_private,
    wait_to_connect,
)

_connect, _set_blocking = _socket.socket.connect, _socket.socket.setblocking
_poll, _POLLIN = select.poll, select.POLLIN
#: What poll(2) takes, an ``int`` of milliseconds: 24 days.
_LONGEST_POLL = 0x7FFF_FFFF

#: Where a container that is a guest finds its context's folder mounted.
SELF = Path("/run/vsock/self")


class Attachment:
    """A context of the fabric, as the programs in it know it: by the folder of its control sockets.

    ``folder`` may also be one of the sockets in it.  With ``on_demand`` a missing vsockd is
    started; that is for the user's own fabric only.
    """

    transport = "fabric"

    def __init__(self, folder: str | os.PathLike[str], on_demand: bool = False) -> None:
        path = Path(folder)
        self.folder = path.parent if path.name in (STREAM, SEQPACKET) else path
        self._on_demand = on_demand
        self._doors = {
            int(socket.SOCK_STREAM): os.fspath(self.folder / STREAM),
            int(socket.SOCK_SEQPACKET): os.fspath(self.folder / SEQPACKET),
        }
        self._are_short = all(map(is_short, self._doors.values()))

    def __repr__(self) -> str:
        return f"<attachment to {self.folder}>"

    def enter(self, sock: _socket.socket, kind: int, seconds: float = 0.0) -> float:
        """Connect ``sock``, a unix socket of type ``kind``, to the control socket.

        While vsockd's backlog is full this waits, for ``seconds`` at most, and returns what is left
        of them; OSError ETIMEDOUT, or ENOBUFS when there are none.  ENODEV: no vsockd serves there.
        """
        door = self._doors[kind]
        # The kernel's own connect() would wait for ever.
        blocks = seconds and sock.gettimeout() is None
        if blocks:
            _set_blocking(sock, False)
        try:
            if self._are_short:
                _connect(sock, door)
            else:
                connect_to(functools.partial(_connect, sock), door)
        except (FileNotFoundError, ConnectionRefusedError):
            if not self._on_demand:
                raise OSError(
                    errno.ENODEV, f"no vsockd serves {self.folder} (is it running? try: vsock up)"
                ) from None
            from . import launcher  # here, because few programs need it

            launcher.start(self.folder.parent)
            connect_to(functools.partial(_connect, sock), door)
        except BlockingIOError:
            return wait_to_connect(sock, door, seconds)
        finally:
            if blocks:
                _set_blocking(sock, True)
        return seconds

    def ask(self, request: bytes, fd: int | None = None) -> tuple[Record, int | None]:
        """One question to vsockd on a connection of its own, with a descriptor if need be.

        Returns the answer and the descriptor that came with it.  Raises OSError with the
        errno vsockd answered.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(VSOCKD_REPLY_TIMEOUT_SECONDS)
            left = self.enter(sock, socket.SOCK_SEQPACKET, VSOCKD_REPLY_TIMEOUT_SECONDS)
            if left < VSOCKD_REPLY_TIMEOUT_SECONDS:
                sock.settimeout(left)
            ancillary = [] if fd is None else [with_descriptor(fd)]
            try:
                sock.sendmsg([request], ancillary)
            except OSError as error:
                if error.errno != errno.ETOOMANYREFS:
                    raise
                reason = "this user has too many descriptors in flight"
                raise OSError(errno.ENOBUFS, reason) from None
            data, came, _, _ = sock.recvmsg(RECORD_SIZE, DESCRIPTOR_SPACE, socket.MSG_CMSG_CLOEXEC)
            return client.decode_reply(data), descriptor_in(came)

    @functools.cached_property
    def cid(self) -> int:
        """The context's CID."""
        return self.ask(client.local_cid())[0].local_cid

    def is_trusted(self, sock_type: int, peer_cid: int = VMADDR_CID_HOST, cookie: int = 0) -> bool:
        """Whether this process's sockets of a type are trusted ones (guide page 24).

        A program of the host may be trusted by one guest, ``peer_cid``, and not by another.  A
        socket that is bound, known by its ``cookie``, is what it was when it was bound.
        """
        record, _ = self.ask(client.local_cid(peer_cid, cookie=cookie))
        return record.is_trusted(datagram=sock_type == socket.SOCK_DGRAM)


#: What a connect fails with when there is nobody to connect to.
_NOBODY = frozenset(
    {
        *(errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH),
        *(errno.ENETDOWN, errno.ENODEV, errno.ETIMEDOUT),
    }
)

#: Where a socket can be: in a context of the fabric, or in the machine's own kernel.
ContextHandle = Attachment | KernelContext


def wait_readable(fd: int, seconds: float | None) -> bool:
    """Whether ``fd`` becomes readable within ``seconds``."""
    poll = _poll()
    poll.register(fd, _POLLIN)
    return bool(poll.poll(None if seconds is None else min(seconds * 1000, _LONGEST_POLL)))


def explain(failure: OSError, place: ContextHandle) -> None:
    """Add a note to the ``failure`` of a connect that says which transport was chosen, if it
    was chosen automatically and there is nobody at the other end.
    """
    if failure.errno not in _NOBODY or os.environ.get("VSOCKETS_TRANSPORT", "auto") != "auto":
        return
    if place is not current():  # the program's own choice
        return
    if isinstance(place, KernelContext):
        chosen = "the kernel's AF_VSOCK, which has a CID here (the fabric: vsock run, or "
        chosen += "VSOCKETS_TRANSPORT=fabric)"
    else:
        if os.environ.get("VSOCKETS_CONTEXT"):
            why = "as VSOCKETS_CONTEXT says"
        elif place.folder == SELF:
            why = "which is mounted here"
        else:
            why = "as the kernel's AF_VSOCK leads nowhere"
        chosen = f"the fabric, {place.folder}, {why}"
    note = f"VSOCKETS_TRANSPORT is auto, and this was {chosen}"
    if note not in getattr(failure, "__notes__", ()):
        failure.add_note(note)


@functools.cache
def current() -> ContextHandle:
    """The context this process belongs to.

    ``VSOCKETS_CONTEXT`` if set, else the folder mounted at ``/run/vsock/self``, else the
    kernel's AF_VSOCK if that leads anywhere, else the host of the user's own fabric, which is
    started when it is first needed.  ``VSOCKETS_TRANSPORT`` set to ``fabric`` or ``kernel``
    leaves no other choice.
    """
    transport = os.environ.get("VSOCKETS_TRANSPORT", "auto")
    if transport not in ("fabric", "kernel", "auto"):
        raise OSError(
            errno.EAFNOSUPPORT,
            f"VSOCKETS_TRANSPORT={transport}: expected fabric, kernel or auto",
        )
    if transport == "kernel":
        return KernelContext()
    configured = os.environ.get("VSOCKETS_CONTEXT")
    if configured:
        return Attachment(configured)
    if SELF.is_dir():
        return Attachment(SELF)
    if transport == "auto" and kernel_context.has_transport():
        return KernelContext()
    folder = default_folder()
    if folder.exists():
        require_private(folder)
    return Attachment(folder / str(VMADDR_CID_HOST), on_demand=True)
