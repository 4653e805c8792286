"""Classes of click commands whose help describes arguments and shows whole sentences."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click


@contextmanager
def _errors_of(ctx: click.Context) -> Iterator[None]:
    """Make usage errors in the with block refer to the help of the command of ``ctx``.

    click's parser reports an option without its value as an error of no command.
    """
    try:
        yield
    except click.UsageError as error:
        error.ctx = error.ctx or ctx
        raise


class Argument(click.Argument):
    """A positional argument with a help text, which click itself has only from 8.5 on."""

    def __init__(self, *declarations: Any, help: str = "", **attributes: Any) -> None:
        super().__init__(*declarations, **attributes)
        self.help = help

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """Return the metavar and the help text."""
        return self.metavar or "", self.help or ""

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """Return the name by which messages refer to the argument: FROM for ``[FROM]``."""
        found = re.match(r"\[?([A-Z:]+)", self.metavar or "")
        return found[1] if found else str(self.name).upper()


class Command(click.Command):
    """A command whose help lists its arguments before its options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command's options and arguments."""
        with _errors_of(ctx):
            return super().parse_args(ctx, args)

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write nothing: in every version of click, :meth:`format_options` writes the arguments."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section of the arguments that have a help text, and one of the options."""
        arguments, options = [], []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Argument):
                arguments += [record] if record[1] else []
            elif record is not None:
                options.append(record)
        for title, records in (("Arguments", arguments), ("Options", options)):
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class Group(click.Group):
    """A command with subcommands; its help shows the whole first sentence of each."""

    command_class = Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command's options and arguments."""
        with _errors_of(ctx):
            return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the subcommand that ``args`` name; a usage error suggests a similar name."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            from difflib import get_close_matches

            similar = get_close_matches(name, self.list_commands(ctx), 1)
            ctx.fail(f"no command {name!r}" + "".join(f" (expected {one}?)" for one in similar))
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the subcommands in the order of their declaration."""
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section of the subcommands."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, first_sentence(one.help or "")) for name, one in commands if one]
            )


def command(name: str, **attributes: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """Return a decorator that makes a function the callback of a top-level command."""
    return click.command(name, cls=Command, **attributes)


def group(name: str, **attributes: Any) -> Callable[[Callable[..., Any]], Group]:
    """Return a decorator that makes a function the callback of a group of commands.

    A command line without the subcommand is a usage error.
    """
    attributes.setdefault("no_args_is_help", False)
    return click.group(name, cls=Group, **attributes)


def first_sentence(text: str) -> str:
    """Return the first sentence or paragraph of ``text`` in one line."""
    return " ".join(re.split(r"\n\s*\n|(?<=\.)\s", text.strip())[0].split())
