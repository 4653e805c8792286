"""``vsock context``: the guests of the fabric."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..vmware import VmxError, read_vmx
from .connect import administrator
from .options import CidArgument, JsonOption, ReservedPortsOption, read_cid, read_user
from .output import Column, complain, notice, print_json, print_table, user_name

app = typer.Typer(
    help="Guests: add, list and remove them; suspend, resume, migrate, power off and on.",
    rich_markup_mode=None,
)


class Profile(StrEnum):
    """How isolated a guest is: docs/security.md."""

    DEFAULT = "default"
    RESTRICTED = "restricted"
    LEGACY = "legacy"


@app.command("add")
def add(
    cid: Annotated[
        int | None,
        typer.Argument(parser=read_cid, metavar="[CID]", help="By default one that is free."),
    ] = None,
    name: Annotated[str, typer.Option(metavar="NAME", help="For people to recognise it by.")] = "",
    owner: Annotated[
        int | None,
        typer.Option(
            parser=read_user,
            metavar="USER",
            help="Name or number of the user whose programs it may run; by default vsockd's.",
        ),
    ] = None,
    vmx: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A VMware machine's .vmx file, for CID and name."),
    ] = None,
    profile: Annotated[
        Profile,
        typer.Option(
            help="default: the host and no other guest. restricted: trusted programs only. "
            "legacy: as ESX 4.0 to 5.0."
        ),
    ] = Profile.DEFAULT,
    unrestricted: Annotated[
        bool, typer.Option("--unrestricted", help="With --profile legacy: vmci0.unrestricted.")
    ] = False,
    domain: Annotated[
        str | None, typer.Option(metavar="DOMAIN", help="With --profile legacy: vmci0.domain.")
    ] = None,
    hybrid: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Offer its ports to tools that speak hybrid vsock, Firecracker's convention, at "
            "this unix socket (docs/hybrid.md).",
        ),
    ] = None,
    reserved_ports: ReservedPortsOption = False,
    off: Annotated[bool, typer.Option("--off", help="Leave it powered off.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Add a guest and print its CID.  Starts vsockd if need be."""
    legacy = profile is Profile.LEGACY
    if not legacy and (unrestricted or domain is not None):
        raise typer.BadParameter("--unrestricted and --domain go with --profile legacy")
    if vmx is not None:
        try:
            machine = read_vmx(vmx)
            machine.require_vmci()
            cid = machine.cid if cid is None else cid
            name = name or machine.display_name
            unrestricted = unrestricted or machine.unrestricted
            domain = machine.domain if domain is None else domain
        except VmxError as error:
            raise typer.BadParameter(str(error)) from None
        if not legacy and (unrestricted or domain):
            notice(
                f"{vmx}: vmci0.unrestricted and vmci0.domain have no effect, as since ESXi 5.1; "
                "--profile legacy gives them one"
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


@app.command("ls")
def ls(
    as_json: JsonOption = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "-v",
            "--verbose",
            help="Also show which are leased, which have reserved ports, and their folders.",
        ),
    ] = False,
) -> None:
    """List the contexts that programs can be in."""
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
    if verbose:
        columns += [Column("LEASED"), Column("RESERVED PORTS"), Column("FOLDER", whole=False)]
    print_table(columns, (_row(context)[: len(columns)] for context in contexts))


def _row(context: dict[str, Any]) -> tuple[object, ...]:
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
        context["folder"],
    )


@app.command("rm")
def rm(cid: CidArgument) -> None:
    """Remove a guest.  Refused while it has open streams."""
    with administrator() as control:
        control.remove_context(cid)


def report_left(answer: dict[str, Any]) -> None:
    """Say which streams vsockd could not end; the rest is done and needs no words."""
    for stream in answer["streams_left"]:
        complain(
            "stream {}:{} to {}:{} goes on: ".format(*stream["local"], *stream["peer"])
            + f"vsockd may not reach into its programs (one is pid {stream['pid']})"
        )
    if answer["streams_left"]:
        raise typer.Exit(1)


@app.command("suspend")
def suspend(cid: CidArgument) -> None:
    """Drop a guest's connections and let nothing in or out until it is resumed."""
    with administrator() as control:
        report_left(control.suspend(cid))


@app.command("resume")
def resume(cid: CidArgument) -> None:
    """Let a suspended guest go on; its listening sockets are there still."""
    with administrator() as control:
        report_left(control.resume(cid))


@app.command("migrate")
def migrate(cid: CidArgument) -> None:
    """Drop a guest's connections, as live migration does."""
    with administrator() as control:
        report_left(control.migrate(cid))


class Switch(StrEnum):
    """On or off."""

    ON = "on"
    OFF = "off"


@app.command("ft")
def fault_tolerance(cid: CidArgument, mode: Switch) -> None:
    """Fault tolerance mode: drops a guest's connections, and allows no new ones while on."""
    with administrator() as control:
        report_left(control.fault_tolerance(cid, mode is Switch.ON))


@app.command("power-off")
def power_off(cid: CidArgument) -> None:
    """Drop a guest's connections, take back its ports, and let no program in."""
    with administrator() as control:
        report_left(control.power_off(cid))


@app.command("power-on")
def power_on(cid: CidArgument) -> None:
    """Power a guest on again."""
    with administrator() as control:
        report_left(control.power_on(cid))
