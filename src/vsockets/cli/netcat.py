"""``vsock connect`` and ``vsock listen``: what ``nc`` is to TCP."""

from __future__ import annotations

import errno
import os
import socket as stdlib
from typing import Annotated

import typer

from .._linux.descriptor_passing import guard
from .._linux.sockets import pack_timeval, refuse_descriptors
from ..attachment import ContextHandle, KernelContext, wait_readable
from ..model.address import parse_port
from ..model.constants import (
    AF_VSOCK,
    SO_VM_SOCKETS_CONNECT_TIMEOUT,
    VMADDR_CID_ANY,
    VMADDR_PORT_ANY,
)
from ..socket import socket
from .connect import keep_trying, lasting_context, own_context
from .datagram_relay import DatagramRelay
from .errors import BIND, CONNECT, CliError, cli_error
from .execute import arguments_of, become_served, serve
from .options import CidArgument, read_cid
from .output import notice, user_name
from .relay import StreamRelay

Address = tuple[int, int]

#: What --wait waits out: nobody listens yet, no such guest yet, no vsockd yet.
_NOT_YET = {errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENODEV}


def _read_port(text: str) -> int:
    try:
        return parse_port(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


PortArgument = Annotated[int, typer.Argument(parser=_read_port, metavar="PORT")]
Datagram = Annotated[bool, typer.Option("-u", "--datagram", help="Datagrams, not a stream.")]
Seqpacket = Annotated[bool, typer.Option("--seqpacket", help="Sequenced packets, not a stream.")]
Timeout = Annotated[
    float | None,
    typer.Option(
        "-w",
        "--timeout",
        metavar="SECONDS",
        min=0.0,
        help="Give up when nothing is there, or comes or goes, for so long.",
    ),
]
Quit = Annotated[
    float | None,
    typer.Option(
        "-q",
        "--quit",
        metavar="SECONDS",
        min=0.0,
        help="After the end of standard input, go on for at most so long.",
    ),
]
NoStdin = Annotated[
    bool, typer.Option("-d", "--no-stdin", help="Do not read standard input; only receive.")
]
Execute = Annotated[
    str | None,
    typer.Option(
        "-e",
        "--exec",
        metavar="COMMAND",
        help="Run a command, its standard input and output being the stream.",
    ),
]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Say who is at the other end.")]


def connect(
    cid: CidArgument,
    port: PortArgument,
    datagram: Datagram = False,
    seqpacket: Seqpacket = False,
    timeout: Timeout = None,
    wait: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0, help="Try for so long until a program listens."),
    ] = 0.0,
    source_port: Annotated[
        int | None,
        typer.Option("-p", "--source-port", parser=_read_port, metavar="PORT", help="Ours."),
    ] = None,
    quit_after: Quit = None,
    no_stdin: NoStdin = False,
    execute: Execute = None,
    verbose: Verbose = False,
) -> None:
    """Connect to CID:PORT, and join it to standard input and output.

    The end of standard input is passed on, and what the peer still has to say is received.
    CID is a number, host, local or hypervisor.
    """
    kind = _type(datagram, seqpacket, execute)
    command = arguments_of(execute)
    _open_standard_descriptors()
    if datagram:
        context = lasting_context()
        DatagramRelay(
            lambda address: _bound(kind, address, context),
            (VMADDR_CID_ANY, VMADDR_PORT_ANY if source_port is None else source_port),
            context,
            (cid, port),
            read_stdin=not no_stdin,
            idle=timeout,
            quit_after=quit_after,
            wait=wait,
            verbose=verbose,
        ).run()
        return
    try:
        sock = keep_trying(
            lambda: _connected(kind, (cid, port), source_port, timeout), wait, _NOT_YET
        )
    except OSError as error:
        raise cli_error(f"connect to {cid}:{port}", error, CONNECT) from None
    if verbose:
        notice(f"connected to {_describe_peer(sock)} from {_describe(sock.getsockname())}")
    if command:
        become_served(command, sock)
    relay = StreamRelay(read_stdin=not no_stdin, idle=timeout, quit_after=quit_after)
    relay.add(sock)
    relay.run()


def listen(
    port: PortArgument,
    datagram: Datagram = False,
    seqpacket: Seqpacket = False,
    timeout: Timeout = None,
    keep: Annotated[
        bool, typer.Option("-k", "--keep", help="Go on accepting, several at a time.")
    ] = False,
    cid: Annotated[
        int | None,
        typer.Option(
            "--cid", parser=read_cid, metavar="CID", help="Bind to it: local is for loopback only."
        ),
    ] = None,
    quit_after: Quit = None,
    no_stdin: NoStdin = False,
    execute: Execute = None,
    verbose: Verbose = False,
) -> None:
    """Wait for a connection to PORT, and go on like connect.

    With -k standard input goes to all who are connected.  With -u every datagram is printed,
    and standard input goes to whoever sent the last one.  PORT any takes a free one and says
    which.
    """
    kind = _type(datagram, seqpacket, execute)
    command = arguments_of(execute)
    _open_standard_descriptors()
    address = (VMADDR_CID_ANY if cid is None else cid), port
    if datagram:
        context = lasting_context()
        relay = DatagramRelay(
            lambda address: _bound(kind, address, context),
            address,
            context,
            read_stdin=not no_stdin,
            idle=timeout,
            quit_after=quit_after,
            verbose=verbose,
        )
        if verbose or port == VMADDR_PORT_ANY:
            notice(f"listening on {_describe(relay.address)}{_place()}")
        relay.run()
        if not relay.received:
            raise CliError(f"nothing came within {timeout} s")
        return

    sock = _bound(kind, address, own_context())
    sock.listen()
    if verbose or port == VMADDR_PORT_ANY:
        notice(f"listening on {_describe(sock.getsockname())}{_place()}")

    def accept() -> socket:
        accepted: socket = sock.accept()[0]
        if verbose:
            notice(f"connection from {_describe_peer(accepted)}")
        return accepted

    if keep and command:
        serve(sock, accept, command)
    elif keep:
        StreamRelay(
            read_stdin=not no_stdin,
            idle=timeout,
            quit_after=quit_after,
            listener=sock,
            accept=accept,
        ).run()
    else:
        if not wait_readable(sock.fileno(), timeout):
            raise CliError(f"nobody connected within {timeout:g} s")
        accepted = accept()
        sock.close()  # whoever comes now is told that nobody listens
        if command:
            become_served(command, accepted)
        once = StreamRelay(read_stdin=not no_stdin, idle=timeout, quit_after=quit_after)
        once.add(accepted)
        once.run()


def _type(datagram: bool, seqpacket: bool, execute: str | None) -> int:
    if datagram and seqpacket:
        raise typer.BadParameter("--datagram and --seqpacket exclude each other")
    if datagram and execute is not None:
        raise typer.BadParameter("--exec needs a stream: datagrams have no beginning and no end")
    if datagram:
        return stdlib.SOCK_DGRAM
    return stdlib.SOCK_SEQPACKET if seqpacket else stdlib.SOCK_STREAM


def _bound(kind: int, address: Address, context: ContextHandle) -> socket:
    sock = socket(type=kind, context=context)
    if kind == stdlib.SOCK_DGRAM:  # vsockd passes a listener the descriptors of its streams
        guard(sock)
    try:
        sock.bind(address)
    except OSError as error:
        raise cli_error(f"bind to {_describe(address)}", error, BIND) from None
    return sock


def _connected(
    kind: int, address: Address, source_port: int | None, timeout: float | None
) -> socket:
    sock = socket(type=kind, context=own_context())
    refuse_descriptors(sock)
    try:
        if source_port is not None:
            sock.bind((VMADDR_CID_ANY, source_port))
        if timeout:
            sock.setsockopt(AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, pack_timeval(timeout))
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _place() -> str:
    """Return what tells the kernel's AF_VSOCK from the fabric, in a message."""
    return ", the kernel's AF_VSOCK" if isinstance(own_context(), KernelContext) else ""


def _describe(address: Address) -> str:
    cid, port = ("any" if number == VMADDR_CID_ANY else str(number) for number in address)
    return f"{cid}:{port}"


def _describe_peer(sock: socket) -> str:
    pid, uid, _ = sock.peer_credentials()
    return f"{_describe(sock.getpeername())} (pid {pid}, user {user_name(uid)}, uid {uid})"


def _open_standard_descriptors() -> None:
    """A descriptor that was closed on us must not become a socket's."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
