"""``vsock connect`` and ``vsock listen``: for vSockets what ``nc`` does for TCP."""

from __future__ import annotations

import errno
import socket as stdlib

import click

from .._linux.descriptor_passing import guard
from .._linux.sockets import closed_on_failure, pack_timeval, refuse_descriptors
from ..attachment import ContextHandle, KernelContext, wait_readable
from ..model.constants import (
    AF_VSOCK,
    SO_VM_SOCKETS_CONNECT_TIMEOUT,
    VMADDR_CID_ANY,
    VMADDR_PORT_ANY,
)
from ..socket import socket
from .connect import keep_trying, lasting_context, own_context
from .errors import BIND, CONNECT, CliError, cli_error
from .execute import exec_on_socket, serve, split_command
from .groups import command
from .options import argument, cid_option, read_cid, read_port, seconds_option
from .output import notice, user_name
from .relay import Address, DatagramRelay, StreamRelay

#: Errors after which --wait retries: no listener yet, no such guest yet, no vsockd yet.
_NOT_YET = {errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENODEV}

_port_argument = argument("port", type=read_port, metavar="PORT")
_datagram_option = click.option(
    "-u", "--datagram", is_flag=True, help="Use datagrams instead of a stream."
)
_seqpacket_option = click.option(
    "--seqpacket", is_flag=True, help="Use sequenced packets instead of a stream."
)
_timeout_option = seconds_option(
    "-w",
    "--timeout",
    help="Give up when the connection is not made in this time, or silent for this long. "
    "Default: never.",
)
_quit_option = seconds_option(
    "-q",
    "--quit",
    "quit_after",
    help="End this long after the end of standard input. Default: when the peer ends.",
)
_no_stdin_option = click.option(
    "-d", "--no-stdin", is_flag=True, help="Do not read standard input; only receive."
)
_exec_option = click.option(
    "-e",
    "--exec",
    "execute",
    metavar="COMMAND",
    help="Run a command with the stream as its standard input and output.",
)
_verbose_option = click.option(
    "-v", "--verbose", is_flag=True, help="Print the peer's address, process and user."
)


def _read_destination(text: str) -> int:
    if ":" in text:
        raise click.BadParameter(f"CID {text!r}: expected CID and PORT as two arguments")
    return int(read_cid(text))


@command("connect")
@argument("cid", type=_read_destination, metavar="CID")
@_port_argument
@_datagram_option
@_seqpacket_option
@_timeout_option
@seconds_option(
    "--wait", default=0.0, help="Retry this long while no program listens there, in seconds."
)
@click.option(
    "-p",
    "--source-port",
    type=read_port,
    metavar="PORT",
    help="Local port to connect from. Default: a free one.",
)
@_quit_option
@_no_stdin_option
@_exec_option
@_verbose_option
def connect(
    cid: int,
    port: int,
    datagram: bool,
    seqpacket: bool,
    timeout: float | None,
    wait: float,
    source_port: int | None,
    quit_after: float | None,
    no_stdin: bool,
    execute: str | None,
    verbose: bool,
) -> None:
    """Connect to CID:PORT, and relay standard input and output.

    The end of standard input half-closes the stream; data of the peer is received to its end.
    CID is a number, host, local or hypervisor.
    """
    if VMADDR_CID_ANY in (cid, port):  # VMADDR_PORT_ANY is the same number
        raise click.UsageError("any is not a destination (expected a number)")
    kind = _type(datagram, seqpacket, execute)
    program = split_command(execute)
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
    if program:
        exec_on_socket(program, sock)
    relay = StreamRelay(read_stdin=not no_stdin, idle=timeout, quit_after=quit_after)
    relay.add(sock)
    relay.run()


@command("listen")
@_port_argument
@_datagram_option
@_seqpacket_option
@_timeout_option
@click.option(
    "-k", "--keep", is_flag=True, help="Keep accepting, with any number of peers at a time."
)
@cid_option("--cid", help="CID to bind to; local accepts from this context only. Default: any.")
@_quit_option
@_no_stdin_option
@_exec_option
@_verbose_option
def listen(
    port: int,
    datagram: bool,
    seqpacket: bool,
    timeout: float | None,
    keep: bool,
    cid: int | None,
    quit_after: float | None,
    no_stdin: bool,
    execute: str | None,
    verbose: bool,
) -> None:
    """Accept a connection to PORT, and relay standard input and output.

    With -k standard input goes to all connected peers.  With -u every datagram is printed,
    and standard input goes to the source of the last one.  PORT any binds a free port and prints
    it.
    """
    kind = _type(datagram, seqpacket, execute)
    program = split_command(execute)
    address = (VMADDR_CID_ANY if cid is None else cid), port
    announce = verbose or port == VMADDR_PORT_ANY
    if datagram:
        _receive_datagrams(address, announce, not no_stdin, timeout, quit_after, verbose)
        return

    sock = _bound(kind, address, own_context())
    sock.listen()
    if announce:
        notice(f"listening on {_describe(sock.getsockname())}{_transport()}")

    def accept() -> socket:
        accepted: socket = sock.accept()[0]
        if verbose:
            notice(f"connection from {_describe_peer(accepted)}")
        return accepted

    if keep and program:
        serve(sock, accept, program)
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
            raise CliError(f"no client connected within {timeout:g} s")
        accepted = accept()
        sock.close()  # later clients are refused
        if program:
            exec_on_socket(program, accepted)
        once = StreamRelay(read_stdin=not no_stdin, idle=timeout, quit_after=quit_after)
        once.add(accepted)
        once.run()


def _receive_datagrams(
    address: Address,
    announce: bool,
    read_stdin: bool,
    timeout: float | None,
    quit_after: float | None,
    verbose: bool,
) -> None:
    context = lasting_context()
    relay = DatagramRelay(
        lambda address: _bound(stdlib.SOCK_DGRAM, address, context),
        address,
        context,
        read_stdin=read_stdin,
        idle=timeout,
        quit_after=quit_after,
        verbose=verbose,
    )
    if announce:
        notice(f"listening on {_describe(relay.address)}{_transport()}")
    relay.run()
    if not relay.received:
        raise CliError(f"no datagram arrived within {timeout} s")


def _type(datagram: bool, seqpacket: bool, execute: str | None) -> int:
    if datagram and seqpacket:
        raise click.UsageError("--datagram and --seqpacket exclude each other")
    if datagram and execute is not None:
        raise click.UsageError("--exec needs a stream: datagrams have no start and no end")
    if datagram:
        return stdlib.SOCK_DGRAM
    return stdlib.SOCK_SEQPACKET if seqpacket else stdlib.SOCK_STREAM


def _bound(kind: int, address: Address, context: ContextHandle) -> socket:
    sock = socket(type=kind, context=context)
    if kind == stdlib.SOCK_DGRAM:  # a listener's descriptors come from vsockd, and are allowed
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
    with closed_on_failure(sock):
        if source_port is not None:
            sock.bind((VMADDR_CID_ANY, source_port))
        if timeout:
            sock.setsockopt(AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, pack_timeval(timeout))
        sock.connect(address)
    return sock


def _transport() -> str:
    """Return the suffix of messages that names the kernel's AF_VSOCK; empty if it is not in use."""
    return ", the kernel's AF_VSOCK" if isinstance(own_context(), KernelContext) else ""


def _describe(address: Address) -> str:
    cid, port = ("any" if number == VMADDR_CID_ANY else str(number) for number in address)
    return f"{cid}:{port}"


def _describe_peer(sock: socket) -> str:
    pid, uid, _ = sock.peer_credentials()
    return f"{_describe(sock.getpeername())} (pid {pid}, user {user_name(uid)}, uid {uid})"
