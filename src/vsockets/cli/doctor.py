"""``vsock doctor``: what this machine can do, and what the rest would take."""

from __future__ import annotations

import typer

from .options import JsonOption
from .output import Column, print_json, print_table


def doctor(as_json: JsonOption = False) -> None:
    """Find out what this machine can do.  Exits with 1 if not even the fabric works."""
    from .doctor_checks import CHECKS, fabric  # here: it takes a while, and other commands' time

    findings = {check: check() for check in CHECKS}
    if as_json:
        print_json([finding._asdict() for finding in findings.values()])
    else:
        columns = [
            Column("WHAT", whole=False),
            Column(""),
            Column("DETAIL", whole=False),
            Column("FOR THE REST", whole=False),
        ]
        print_table(columns, findings.values())
    if findings[fabric].state != "yes":
        raise typer.Exit(1)
