"""``vsock context`` and ``vsock disconnect``: manage the fabric's guests and streams."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ..fabric.settings import Profile
from ..guestrpc.client import announce_suspend, claims_of_guests
from ..model.address import parse_cid, parse_port
from ..state_folder import default_folder
from ..vmware import VmxError, read_vmx
from .connect import administrator
from .groups import command, group
from .options import (
    argument,
    cid_argument,
    json_option,
    members,
    parser_of,
    path_option,
    read_guest,
    read_user,
    reserved_ports_option,
)
from .output import Column, complain, notice, print_json, print_table, user_name


@group("context")
def context() -> None:
    """Add, list, remove, suspend, migrate and power guests."""


@context.command("add")
@argument(
    "cid",
    type=read_guest,
    required=False,
    metavar="[CID]",
    help="CID of the guest. Default: a free one.",
)
@click.option(
    "--name",
    default="",
    show_default=False,
    metavar="NAME",
    help="Name shown in listings and logs.",
)
@click.option(
    "--owner",
    type=read_user,
    metavar="USER",
    help="User whose programs may join the guest: name or uid. Default: vsockd's user.",
)
@path_option(
    "--vmx", metavar="FILE", help="Take CID and name from this .vmx file of a VMware machine."
)
@click.option(
    "--profile",
    **members(Profile),
    default=Profile.DEFAULT.value,
    help="Isolation. default: communicates with the host only. restricted: with trusted programs "
    "of the host only. legacy: as ESX 4.0 to 5.0.",
)
@click.option("--unrestricted", is_flag=True, help="With --profile legacy: vmci0.unrestricted.")
@click.option("--domain", metavar="DOMAIN", help="With --profile legacy: vmci0.domain.")
@path_option(
    "--hybrid",
    metavar="PATH",
    help="Let clients connect to the guest's ports at this unix socket, by Firecracker's hybrid "
    "vsock (docs/hybrid.md).",
)
@reserved_ports_option
@click.option("--off", is_flag=True, help="Leave the guest powered off.")
@json_option
def add(
    cid: int | None,
    name: str,
    owner: int | None,
    vmx: Path | None,
    profile: Profile,
    unrestricted: bool,
    domain: str | None,
    hybrid: Path | None,
    reserved_ports: bool,
    off: bool,
    as_json: bool,
) -> None:
    """Add a guest and print its CID.  Starts vsockd if it does not run."""
    legacy = profile is Profile.LEGACY
    if not legacy and (unrestricted or domain is not None):
        raise click.UsageError("--unrestricted and --domain need --profile legacy")
    if vmx is not None:
        try:
            machine = read_vmx(vmx)
            machine.require_vmci()
            cid = machine.cid if cid is None else cid
            name = name or machine.display_name
            unrestricted = unrestricted or machine.unrestricted
            domain = machine.domain if domain is None else domain
        except VmxError as error:
            raise click.UsageError(f"--vmx {error}") from None
        if not legacy and (unrestricted or domain):
            notice(
                f"{vmx}: vmci0.unrestricted and vmci0.domain are ignored, as since ESXi 5.1 "
                "(--profile legacy applies them)"
            )
    with administrator(start=True) as control:
        added = control.add_context(
            cid,
            name,
            owner,
            profile=profile.value,
            unrestricted=unrestricted if legacy else None,
            domain=domain if legacy else None,
            powered=not off,
            hybrid=None if hybrid is None else hybrid.absolute(),
            reserved_ports=reserved_ports,
        )
    if as_json:
        print_json(added)
        return
    print(added["cid"])
    if sys.stderr.isatty() and sys.stdout.isatty():
        notice(f"run a program in it: vsock run --cid {added['cid']} -- PROGRAM")


@context.command("ls")
@json_option
@click.option(
    "-v",
    "--verbose",
    is_flag=True,
    help="Also show whether a context is leased or has reserved ports, what its VMware Tools claim "
    "(vsock guestinfo), and its folder.",
)
def ls(as_json: bool, verbose: bool) -> None:
    """List the contexts that programs can run in."""
    with administrator() as control:
        contexts = control.contexts()
    if as_json:
        print_json(contexts)
        return
    columns = [
        Column("CID", right=True),
        Column("NAME", least=8),
        Column("STATE"),
        Column("PROFILE", least=10),
        Column("OWNER", least=6),
        Column("SOCKETS", right=True, spare=1),
        Column("WAITING", right=True, spare=2),
        Column("DENIALS", right=True),
    ]
    claims = {}
    if verbose:
        columns += [Column("LEASED"), Column("RESERVED PORTS"), Column("VMWARE TOOLS", least=12)]
        columns += [Column("FOLDER", whole=False)]
        claims = claims_of_guests(default_folder())
    rows = (_row(one, claims.get(one["cid"], "")) for one in contexts)
    print_table(columns, (row[: len(columns)] for row in rows))


def _row(context: dict[str, Any], claims: str) -> tuple[object, ...]:
    usage, limits = context["usage"], context["limits"]

    def used(what: str) -> str:
        return f"{usage[what]}/{limits[what]}" if limits else str(usage[what])

    profile = context["profile"]
    if context["domain"]:
        profile += f" {context['domain']!r}"
    return (
        context["cid"],
        context["name"],
        context["state"] + (" FT" if context["ft"] else ""),
        profile + (" unrestricted" if context["unrestricted"] else ""),
        user_name(context["owner"]),
        used("sockets"),
        used("pending_connects"),
        sum(context["denials"].values()),
        "leased" if context["leased"] else "",
        "granted" if context["reserved_ports"] else "",
        claims,
        context["folder"],
    )


@context.command("rm")
@cid_argument
def rm(cid: int) -> None:
    """Remove a guest.  Fails while it has open streams."""
    with administrator() as control:
        control.remove_context(cid)


def report_left(answer: dict[str, Any]) -> None:
    """Report the streams that vsockd could not close, and exit with 1 if there are any."""
    for stream in answer["streams_left"]:
        complain(
            "stream {}:{} to {}:{} is still open: ".format(*stream["local"], *stream["peer"])
            + f"{stream['reason']} (pid {stream['pid']} opened it)"
        )
    if answer["streams_left"]:
        raise click.exceptions.Exit(1)


@context.command("suspend")
@cid_argument
def suspend(cid: int) -> None:
    """Suspend a guest: drop its connections, and refuse new ones until it is resumed.

    The guest's VMware Tools (vsock guestinfo) are notified before, and after the resume.
    """
    with administrator() as control:
        if problem := announce_suspend(default_folder(), cid):
            notice(f"{problem}; suspending the guest nevertheless")
        report_left(control.suspend(cid))


@context.command("resume")
@cid_argument
def resume(cid: int) -> None:
    """Resume a suspended guest.  The guest's listening sockets still exist."""
    with administrator() as control:
        report_left(control.resume(cid))


@context.command("migrate")
@cid_argument
def migrate(cid: int) -> None:
    """Drop a guest's connections, as live migration does."""
    with administrator() as control:
        report_left(control.migrate(cid))


@context.command("ft")
@cid_argument
@argument("mode", type=click.Choice(("on", "off")), metavar="{on|off}")
def fault_tolerance(cid: int, mode: str) -> None:
    """Set fault tolerance mode: drop a guest's connections, and refuse new ones while on."""
    with administrator() as control:
        report_left(control.fault_tolerance(cid, mode == "on"))


@context.command("power-off")
@cid_argument
def power_off(cid: int) -> None:
    """Power a guest off: drop its connections, free its ports, and refuse programs."""
    with administrator() as control:
        report_left(control.power_off(cid))


@context.command("power-on")
@cid_argument
def power_on(cid: int) -> None:
    """Power a guest on."""
    with administrator() as control:
        report_left(control.power_on(cid))


@parser_of
def _read_address(text: str) -> tuple[int, int]:
    cid, colon, port = text.rpartition(":")
    if not colon:
        raise ValueError(f"{text!r}: expected CID:PORT, as vsock ls shows it")
    return parse_cid(cid), parse_port(port)


@command("disconnect")
@argument("local", type=_read_address, metavar="CID:PORT")
@argument("peer", type=_read_address, metavar="CID:PORT")
def disconnect(local: tuple[int, int], peer: tuple[int, int]) -> None:
    """Close the stream between two addresses.  The order of the addresses does not matter.

    Both ends see the same as when a guest is suspended; vsockd logs the user who asked.
    """
    with administrator() as control:
        report_left(control.disconnect(local, peer))
