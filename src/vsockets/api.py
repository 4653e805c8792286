"""The module-level functions of vsockets: the guide's, and counterparts of the socket module's."""

from __future__ import annotations

import socket as stdlib
from os import PathLike

from .attachment import Attachment, ContextHandle, current
from .model.constants import AF_VSOCK, VMADDR_CID_LOCAL, VMADDR_PORT_ANY
from .socket import socket


def attach(folder: str | PathLike[str]) -> Attachment:
    """Return the context whose control sockets are in ``folder``, for ``socket(context=…)``.

    Only a program that uses several contexts needs this function.  To run a program in one context,
    set ``VSOCKETS_CONTEXT`` or start the program with ``vsock run``.
    """
    return Attachment(folder)


def get_local_cid(*, context: ContextHandle | None = None) -> int:
    """Return the CID of ``context``, by default of this process's context; the host's is 2."""
    return (context or current()).cid


def VMCISock_GetLocalCID() -> int:  # noqa: N802 - the guide's name
    """Return the CID of this process's context (guide page 11), as :func:`get_local_cid` does."""
    return get_local_cid()


def VMCISock_GetAFValue() -> int:  # noqa: N802 - the guide's name
    """Return the address family for ``socket()`` (guide page 11)."""
    return AF_VSOCK


def create_connection(
    address: tuple[int, int],
    timeout: float | None = None,
    source_address: tuple[int, int] | None = None,
    *,
    context: ContextHandle | None = None,
) -> socket:
    """Return a stream connected to ``(cid, port)``, as ``socket.create_connection`` does.

    ``timeout`` is in seconds.  Raises what :meth:`vsockets.socket.connect` raises.
    """
    sock = socket(context=context)
    try:
        if timeout is not None:
            sock.settimeout(timeout)
        if source_address is not None:
            sock.bind(source_address)
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def create_server(
    address: tuple[int, int],
    *,
    type: int = stdlib.SOCK_STREAM,
    backlog: int | None = None,
    context: ContextHandle | None = None,
) -> socket:
    """Return a listening socket bound to ``(cid, port)``, as ``socket.create_server`` does."""
    sock = socket(type=type, context=context)
    try:
        sock.bind(address)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def socketpair(
    type: int = stdlib.SOCK_STREAM,
    *,
    context: ContextHandle | None = None,
) -> tuple[socket, socket]:
    """Return two connected sockets, both in ``context`` or by default in this process's context."""
    with create_server((VMADDR_CID_LOCAL, VMADDR_PORT_ANY), type=type, context=context) as server:
        one = socket(type=type, context=context)
        try:
            one.connect(server.getsockname())
            other, _ = server.accept()
        except BaseException:
            one.close()
            raise
    return one, other
