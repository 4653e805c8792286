"""``vsock ssh-proxy``: ssh to a guest by its CID or its name, without a relay."""

from __future__ import annotations

import os
import socket as stdlib
import stat
from pathlib import Path

import click

from ..model.constants import VMADDR_CID_ANY
from ..model.locator import Locator, Vsock, parse_locator
from .connect import cid_of_name, connected
from .errors import CliError
from .groups import command
from .options import argument, read_port

#: The suffix of a guest's name as a host of ssh.
SUFFIX = ".vsock"

#: Seconds for the connection; ssh has a timeout of its own (ConnectTimeout), for the rest as well.
_TIMEOUT = 60.0

STDOUT = 1

#: The configuration of ssh that is shipped.
CONFIGURATION = Path(__file__).with_name("ssh_config")


@command("ssh-proxy")
@argument(
    "host",
    required=False,
    metavar="[HOST]",
    help="vsock/CID, NAME.vsock (a context's name) or vsock-mux/PATH (hybrid vsock).",
)
@argument("port", type=read_port, required=False, metavar="[PORT]", help="Port. Default: 22.")
@click.option("--config", is_flag=True, help="Print the ssh configuration that calls this command.")
def ssh_proxy(host: str | None, port: int | None, config: bool) -> None:
    """Connect to a guest's port for ssh, and hand the connection to it.

    For the options ProxyCommand and ProxyUseFdpass of ssh: the connection's descriptor is passed
    over standard output, so that no process stays between ssh and the guest.
    """
    if config:
        print(CONFIGURATION.read_text(), end="")
        return
    if host is None:
        raise click.UsageError("expected HOST, or --config")
    if not stat.S_ISSOCK(os.fstat(STDOUT).st_mode):
        raise CliError("standard output is not a socket (expected: called by ssh, ProxyUseFdpass)")
    target = _target(host, 22 if port is None else port)
    with connected(target, _TIMEOUT) as sock, stdlib.socket(fileno=os.dup(STDOUT)) as ssh:
        stdlib.send_fds(ssh, [b"\0"], [sock.fileno()])


def _target(host: str, port: int) -> Locator:
    """Return the address of a host of ssh.

    Raises CliError or click.UsageError for a host without an address.
    """
    kind, slash, rest = host.partition("/")
    try:
        if kind == "vsock-mux" and slash:
            return parse_locator(f"vsock-mux/{rest}:{port}")
        if kind == "vsock" and slash:
            target = parse_locator(f"vsock:{rest}:{port}")
            if isinstance(target, Vsock) and target.cid == VMADDR_CID_ANY:
                raise click.UsageError(f"HOST {host}: expected the CID of one context")
            return target
    except ValueError as error:
        raise click.UsageError(f"HOST {host}: {error}") from None
    if not host.removesuffix(SUFFIX) or not host.endswith(SUFFIX):
        expected = f"expected vsock/CID, vsock-mux/PATH or NAME{SUFFIX}"
        raise click.UsageError(f"HOST {host}: {expected}")
    return Vsock(cid_of_name(host.removesuffix(SUFFIX)), port)
