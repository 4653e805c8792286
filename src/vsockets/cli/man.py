"""``vsock man``: manual pages, generated from the commands themselves."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import click

from .groups import command, first_sentence
from .options import path_argument

_ENVIRONMENT = (
    ("VSOCKETS_DIR", "State folder; by default /run/vsock for root, else $XDG_RUNTIME_DIR/vsock."),
    ("VSOCKETS_CONTEXT", "Folder of the context that a program belongs to."),
    ("VSOCKETS_TRANSPORT", "Transport of vSockets: fabric, kernel or auto (the default)."),
)


@command("man")
@path_argument("folder", metavar="DIR", help="Folder to write to, such as /usr/share/man.")
@click.pass_context
def man(context: click.Context, folder: Path) -> None:
    """Write the manual pages of all commands.

    The pages go to DIR/man1, vsockd's to DIR/man8.
    """
    from ..daemon.__main__ import make_parser

    root = context.find_root()
    for page in [*_pages_of(root.command, "vsock"), _page_of_parser(make_parser())]:
        section = folder / f"man{page.section}"
        section.mkdir(parents=True, exist_ok=True)
        (section / f"{page.name}.{page.section}").write_text(_roff(page))


class _Page(NamedTuple):
    name: str
    section: int
    usage: str
    text: str  #: paragraphs; the first sentence summarizes the command
    options: list[tuple[str, str]]
    commands: list[tuple[str, str]]  #: name and summary of each subcommand's page


def _pages_of(
    command: click.Command, words: str, parent: click.Context | None = None
) -> Iterator[_Page]:
    """Yield the pages of ``command``, called as ``words``, and of its subcommands."""
    context = command.make_context(
        words.rpartition(" ")[2], [], parent=parent, resilient_parsing=True
    )
    below: dict[str, click.Command] = {}
    if isinstance(command, click.Group):
        found = {
            name: command.get_command(context, name) for name in command.list_commands(context)
        }
        below = {name: one for name, one in found.items() if one is not None}
    records = [parameter.get_help_record(context) for parameter in command.params]
    yield _Page(
        words.replace(" ", "-"),
        1,
        " ".join([words, *command.collect_usage_pieces(context)]),
        command.help or "",
        [record for record in records if record is not None],
        [
            (f"{words} {name}".replace(" ", "-"), first_sentence(one.help or ""))
            for name, one in below.items()
        ],
    )
    for name, one in below.items():
        yield from _pages_of(one, f"{words} {name}", context)


def _page_of_parser(parser: argparse.ArgumentParser) -> _Page:
    """Return the page of vsockd, whose options are those of an argparse parser."""
    formatter = argparse.HelpFormatter(parser.prog)
    options = [
        (formatter._format_action_invocation(action), (action.help or "") % vars(action))
        for action in parser._actions
    ]
    text = (
        "Run the daemon of a vSockets fabric.\n\n"
        "vsock up starts it, and so does the first program that needs it."
    )
    return _Page(parser.prog, 8, f"{parser.prog} [OPTIONS]", text, options, [])


def _roff(page: _Page) -> str:
    """Return the text of a page with the macros of man(7)."""
    summary = first_sentence(page.text).rstrip(".")
    lines = [
        f'.TH "{page.name.upper()}" "{page.section}" "" "vsockets" "vSockets"',
        *(".SH NAME", f"{_escape(page.name)} \\- {_escape(summary[:1].lower() + summary[1:])}"),
        *(".SH SYNOPSIS", f".B {_escape(page.usage)}", ".SH DESCRIPTION"),
        *_paragraphs(page.text),
    ]
    if page.commands:
        lines += [".SH COMMANDS", *_list((f"{name}(1)", text) for name, text in page.commands)]
    lines += [".SH OPTIONS", *_list(page.options)]
    lines += [".SH ENVIRONMENT", *_list(_ENVIRONMENT)]
    parent = page.name.rpartition("-")[0]
    others = [f"{parent}(1)"] if parent else ["vsock(1)"] if page.section == 8 else ["vsockd(8)"]
    return "\n".join([*lines, ".SH SEE ALSO", *map(_escape, others), ""])


def _list(items: Iterable[tuple[str, str]]) -> Iterator[str]:
    for head, text in items:
        yield from (".TP", f".B {_escape(head)}", _escape(" ".join(text.split())) or "\\&")


def _paragraphs(text: str) -> Iterator[str]:
    for number, paragraph in enumerate(re.split(r"\n\s*\n", textwrap.dedent(text).strip())):
        if number:
            yield ".PP"
        yield _escape(" ".join(paragraph.split()))


def _escape(text: str) -> str:
    """Return ``text`` with roff's special characters escaped."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text[:1] in (".", "'") else text
