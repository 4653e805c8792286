"""``vsock man``: manual pages, made from the command line itself."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

_ENVIRONMENT = (
    ("VSOCKETS_DIR", "The state folder; by default /run/vsock for root, $XDG_RUNTIME_DIR/vsock."),
    ("VSOCKETS_CONTEXT", "The folder of the context that a program is in."),
    ("VSOCKETS_TRANSPORT", "fabric, kernel or auto: what vSockets are made of."),
)


def man(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Such as /usr/share/man.")],
) -> None:
    """Write manual pages of all commands to DIR/man1, and vsockd's to DIR/man8."""
    from ..daemon.__main__ import make_parser

    root = context.find_root()
    for page in [*_of_commands(root.command, "vsock"), _of_parser(make_parser())]:
        section = folder / f"man{page.section}"
        section.mkdir(parents=True, exist_ok=True)
        (section / f"{page.name}.{page.section}").write_text(_roff(page))


class _Page(NamedTuple):
    name: str  #: of the page
    section: int
    usage: str
    text: str  #: paragraphs; the first says what it is
    options: list[tuple[str, str]]
    commands: list[tuple[str, str]]  #: pages of the commands below it


def _of_commands(command: Any, words: str, above: Any = None) -> Iterator[_Page]:
    """Of ``command`` and those below; ``words`` are how it is called."""
    context = command.context_class(command, info_name=words.rpartition(" ")[2], parent=above)
    below = getattr(command, "commands", {})
    yield _Page(
        words.replace(" ", "-"),
        1,
        " ".join([words, *command.collect_usage_pieces(context)]),
        command.help or "",
        [
            (names.replace(" <Any>", ""), text)
            for names, text in filter(
                None, (parameter.get_help_record(context) for parameter in command.params)
            )
        ],
        [
            (f"{words} {name}".replace(" ", "-"), _first_sentence(one.help or ""))
            for name, one in below.items()
        ],
    )
    for name, one in below.items():
        yield from _of_commands(one, f"{words} {name}", context)


def _of_parser(parser: argparse.ArgumentParser) -> _Page:
    """Of a program that does without typer."""
    formatter = argparse.HelpFormatter(parser.prog)
    options = [
        (formatter._format_action_invocation(action), (action.help or "") % vars(action))
        for action in parser._actions
    ]
    text = "Be the daemon of a fabric of vSockets.\n\nvsock up starts it, and it starts by itself."
    return _Page(parser.prog, 8, f"{parser.prog} [OPTIONS]", text, options, [])


def _roff(page: _Page) -> str:
    """The page's text in the man(7) macros."""
    what = _first_sentence(page.text).rstrip(".")
    lines = [
        f'.TH "{page.name.upper()}" "{page.section}" "" "vsockets" "vSockets"',
        *(".SH NAME", f"{_escaped(page.name)} \\- {_escaped(what[:1].lower() + what[1:])}"),
        *(".SH SYNOPSIS", f".B {_escaped(page.usage)}", ".SH DESCRIPTION"),
        *_paragraphs(page.text),
    ]
    if page.commands:
        lines += [".SH COMMANDS", *_list((f"{name}(1)", text) for name, text in page.commands)]
    lines += [".SH OPTIONS", *_list(page.options)]
    lines += [".SH ENVIRONMENT", *_list(_ENVIRONMENT)]
    parent = page.name.rpartition("-")[0]
    others = [f"{parent}(1)"] if parent else ["vsock(1)"] if page.section == 8 else ["vsockd(8)"]
    return "\n".join([*lines, ".SH SEE ALSO", *map(_escaped, others), ""])


def _list(items: Iterable[tuple[str, str]]) -> Iterator[str]:
    for head, text in items:
        yield from (".TP", f".B {_escaped(head)}", _escaped(" ".join(text.split())) or "\\&")


def _paragraphs(text: str) -> Iterator[str]:
    for number, paragraph in enumerate(re.split(r"\n\s*\n", textwrap.dedent(text).strip())):
        if number:
            yield ".PP"
        yield _escaped(" ".join(paragraph.split()))


def _first_sentence(text: str) -> str:
    return " ".join(re.split(r"\n\s*\n|(?<=\.)\s", text.strip())[0].split())


def _escaped(text: str) -> str:
    """So that roff takes it for what it is."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text[:1] in (".", "'") else text
