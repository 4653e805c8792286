"""``vsock context``: the guests of the fabric."""

from __future__ import annotations

import pwd
import sys
from typing import Annotated

import typer

from ..address import parse_cid
from .output import Column, notice, print_json, print_table, user_name
from .reach import administrator

app = typer.Typer(help="Add, list and remove guests.", rich_markup_mode=None)


def read_cid(text: str) -> int:
    """A CID from the command line; a usage error when it is none."""
    try:
        return parse_cid(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _read_user(text: str) -> int:
    if text.isdecimal():
        return int(text)
    try:
        return pwd.getpwnam(text).pw_uid
    except KeyError:
        raise typer.BadParameter(f"there is no user {text!r}") from None


CidArgument = Annotated[int, typer.Argument(parser=read_cid, metavar="CID")]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.command("add")
def add(
    cid: Annotated[
        int | None,
        typer.Argument(parser=read_cid, metavar="[CID]", help="By default one that is free."),
    ] = None,
    name: Annotated[str, typer.Option(help="For people to recognise it by.")] = "",
    owner: Annotated[
        int | None,
        typer.Option(
            parser=_read_user,
            metavar="USER",
            help="Name or number of the user whose programs it may run; by default vsockd's.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Add a guest and print its CID.  Starts vsockd if need be."""
    with administrator(start=True) as control:
        added = control.add_context(cid, name, owner)
    if as_json:
        print_json(added)
        return
    print(added["cid"])
    if sys.stderr.isatty() and sys.stdout.isatty():
        notice(f"run a program in it: vsock run --cid {added['cid']} -- PROGRAM")


@app.command("ls")
def ls(as_json: JsonOption = False) -> None:
    """List the contexts that programs can be in."""
    with administrator() as control:
        contexts = control.contexts()
    if as_json:
        print_json(contexts)
        return
    columns = [
        Column("CID", right=True),
        Column("NAME", whole=False),
        Column("OWNER"),
        Column("LEASED"),
        Column("PORTS", right=True),
        Column("FOLDER", whole=False),
    ]
    print_table(
        columns,
        (
            (
                context["cid"],
                context["name"],
                user_name(context["owner"]),
                "leased" if context["leased"] else "",
                context["ports"],
                context["folder"],
            )
            for context in contexts
        ),
    )


@app.command("rm")
def rm(cid: CidArgument) -> None:
    """Remove a guest.  Refused while it has open streams."""
    with administrator() as control:
        control.remove_context(cid)
