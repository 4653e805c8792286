"""``vsock guestinfo``: the hypervisor service of VMware Tools, and the guests' variables."""

from __future__ import annotations

import base64
import dataclasses
import errno
import gzip
import hashlib
import logging
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .. import logs
from ..guestrpc.client import CONTROL, RequestFailed, request, to_bytes, to_text
from ..guestrpc.commands import STATE_CHANGES
from ..guestrpc.guest import Permissions, variables_of
from ..guestrpc.variables import VariableRefused, full_name
from ..model.constants import VMADDR_CID_HYPERVISOR
from ..state_folder import default_folder
from ..vmware import VmxError, read_vmx
from .connect import administrator
from .errors import CliError
from .groups import group
from .options import (
    argument,
    cid_argument,
    configure_log,
    json_option,
    log_format_option,
    path_option,
    read_cid,
    state_file,
    verbose_option,
)
from .output import Column, print_json, print_table

#: Encodings of a value by which cloud-init and others read it, as they name them.
_ENCODINGS: dict[str, Callable[[bytes], bytes]] = {
    "base64": base64.b64encode,
    "gzip+base64": lambda value: base64.b64encode(gzip.compress(value, mtime=0)),
}

_name_argument = argument(
    "name", metavar="NAME", help="Name of the variable; guestinfo. is prefixed if it is missing."
)


@group("guestinfo")
def guestinfo() -> None:
    """Serve VMware Tools in guests, and the variables they ask for."""


@guestinfo.command("serve")
@path_option(
    "--state",
    metavar="FILE",
    help="File that keeps the guests' variables. "
    "Default: vsock/guestinfo in XDG_STATE_HOME or ~/.local/state; another one for each "
    "VSOCKETS_DIR.",
)
@verbose_option
@log_format_option
def serve(state: Path | None, verbose: bool, log_format: str) -> None:
    """Serve the tools of all guests that were enabled, until SIGTERM or Ctrl-C.

    Guests connect to the hypervisor, CID 0, at ports 976 and 975.  Start this before the guests:
    their tools exit when a reconnect fails.
    """
    from ..attachment import Attachment
    from ..guestrpc import service

    configure_log(verbose, log_format)
    with administrator(start=True):
        pass
    folder = default_folder()
    path = state or _default_state(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _make_private(path)
    except OSError as error:
        raise CliError(f"--state {path}: {error.strerror}") from None
    log = logging.getLogger("vsockets.guestinfo")

    def ready() -> None:
        log.log(logs.NOTICE, "serving VMware Tools at CID 0, ports 976 and 975")

    context = Attachment(folder / str(VMADDR_CID_HYPERVISOR))
    sys.exit(service.run(context, path, folder / CONTROL, ready))


@guestinfo.command("enable")
@cid_argument
@path_option(
    "--vmx",
    metavar="FILE",
    help="Take the guestinfo variables and their permissions from this .vmx file.",
)
def enable(cid: int, vmx: Path | None) -> None:
    """Serve a guest's tools; no guest can enable itself.

    Variables of the guest that had this CID before are removed if that guest had another .vmx file,
    or had none and its context was removed.  A guest whose context is removed is disabled.
    """
    admit(cid, vmx)


@guestinfo.command("disable")
@cid_argument
def disable(cid: int) -> None:
    """Refuse a guest's tools, and remove its variables."""
    _ask("remove", cid=cid)


@guestinfo.command("set")
@cid_argument
@_name_argument
@argument("value", required=False, metavar="[VALUE]", help="Value; or give --file.")
@path_option("--file", metavar="FILE", help="Read the value from this file.")
@click.option(
    "--encode",
    type=click.Choice(tuple(_ENCODINGS)),
    help="Encode the value, and say so in the variable NAME.encoding, as cloud-init reads it.",
)
def set_(cid: int, name: str, value: str | None, file: Path | None, encode: str | None) -> None:
    """Set a variable of a guest."""
    if (value is None) == (file is None):
        raise click.UsageError("expected either VALUE or --file")
    try:
        data = to_bytes(value or "") if file is None else file.read_bytes()
    except OSError as error:
        raise click.UsageError(f"--file {file}: {error.strerror}") from None
    full = _full_name(name)
    values = {full: data}
    if encode is not None:
        values = {full: _ENCODINGS[encode](data), f"{full}.encoding": encode.encode()}
    _ask("set", cid=cid, values={name: to_text(value) for name, value in values.items()})


@guestinfo.command("get")
@cid_argument
@_name_argument
def get(cid: int, name: str) -> None:
    """Print the value that a guest gets for a variable."""
    full = _full_name(name)
    values = {writer: value for found, writer, value in _variables(cid) if found == full}
    if not values:
        raise CliError(f"guest {cid} has no {full} (see: vsock guestinfo ls {cid})")
    value = values.get("guest", values.get("host", ""))
    sys.stdout.buffer.write(to_bytes(value) + b"\n")


@guestinfo.command("unset")
@cid_argument
@_name_argument
def unset(cid: int, name: str) -> None:
    """Remove a variable of a guest, whether the host or the guest has set it."""
    full = _full_name(name)
    if not _ask("unset", cid=cid, name=full):
        raise CliError(f"guest {cid} has no {full} (see: vsock guestinfo ls {cid})")


@guestinfo.command("ls")
@argument(
    "cid",
    type=read_cid,
    required=False,
    metavar="[CID]",
    help="Guest whose variables are listed. Default: list the guests.",
)
@json_option
def ls(cid: int | None, as_json: bool) -> None:
    """List the enabled guests, with what their tools claim, or a guest's variables."""
    if cid is None:
        _list_guests(as_json)
    else:
        _list_variables(cid, as_json)


@guestinfo.command("send")
@cid_argument
@argument(
    "change",
    type=click.Choice(tuple(STATE_CHANGES)),
    metavar="CHANGE",
    help="halt, reboot, power-on, suspend or resume. The last three only run the guest's scripts.",
)
def send(cid: int, change: str) -> None:
    """Ask a guest's tools to halt or reboot the guest, or notify them of a state change."""
    _ask("send", cid=cid, change=change)


def described(vmx: Path) -> dict[str, Any]:
    """Return what the service needs of a ``.vmx`` file.  Raises click.UsageError."""
    try:
        machine = read_vmx(vmx)
        values, permissions = variables_of(machine), Permissions.of(machine)
    except VmxError as error:
        raise click.UsageError(f"--vmx {error}") from None
    return {
        "identity": os.path.abspath(vmx),
        "permissions": dataclasses.asdict(permissions),
        "values": {name: to_text(value) for name, value in values.items()},
    }


def admit(cid: int, vmx: Path | None) -> None:
    """Have the service serve a guest's tools.  Raises CliError or click.UsageError."""
    _ask("admit", cid=cid, **({"identity": ""} if vmx is None else described(vmx)))


def _list_guests(as_json: bool) -> None:
    guests = _ask("list")
    if as_json:
        print_json(guests)
        return
    columns = (
        Column("CID", right=True),
        Column("TOOLS"),
        Column("HOST NAME", least=9),
        Column("ADDRESS", least=9),
        Column("OS", least=12),
    )
    names = ("host name", "address", "OS")
    print_table(
        columns,
        (
            (
                one["cid"],
                "running" if one["running"] else "-",
                *(one["claims"].get(name, "-") for name in names),
            )
            for one in guests
        ),
    )


def _list_variables(cid: int, as_json: bool) -> None:
    found = _variables(cid)
    if as_json:
        print_json([{"name": name, "set_by": by, "value": value} for name, by, value in found])
        return
    columns = (
        Column("NAME"),
        Column("SET BY"),
        Column("BYTES", right=True),
        Column("VALUE", least=10),
    )
    shown = ((name, by, len(to_bytes(value)), value[:60]) for name, by, value in found)
    print_table(columns, shown)


def _variables(cid: int) -> list[tuple[str, str, str]]:
    return [tuple(one) for one in _ask("variables", cid=cid)]


def _full_name(name: str) -> str:
    try:
        return full_name(name)
    except VariableRefused as error:
        raise click.UsageError(f"NAME {error}") from None


def _ask(do: str, **given: Any) -> Any:
    """Return the service's answer.  Raises CliError."""
    try:
        return request(default_folder(), do, **given)
    except RequestFailed as error:
        raise CliError(str(error)) from None
    except OSError as error:
        why = error.strerror or str(error)
        raise CliError(
            f"guestinfo: the service cannot be reached: {why} (start it: vsock guestinfo serve)"
        ) from None


def _make_private(path: Path) -> None:
    """Create the file if it is missing, and let its owner alone read it.  Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if found.st_mode & 0o077:
            os.fchmod(fd, 0o600)
    finally:
        os.close(fd)


def _default_state(fabric: Path) -> Path:
    """Return the default path of a fabric's state file: each fabric has its own guests."""
    name = "guestinfo"
    if "VSOCKETS_DIR" in os.environ:
        name += "-" + hashlib.sha256(os.fsencode(fabric.absolute())).hexdigest()[:16]
    return state_file(name)
