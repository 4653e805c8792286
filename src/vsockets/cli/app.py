"""The program ``vsock``: its commands, grouped for the help, and what all of them share.

A command's module is imported when the command is called.  Names and one-line helps are kept here,
so that neither ``vsock --help`` nor completion imports a command.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .errors import CliError, one_line
from .groups import Group
from .output import complain, give_folder_in_hints

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

#: By heading of the help: each command, the module it is in, and the first sentence of its help.
SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "Fabric": {
        "up": ("up", "Start vsockd, the fabric's daemon, unless it runs already."),
        "down": ("up", "Stop vsockd."),
        "status": ("up", "Show whether vsockd runs, and its load."),
        "reload": ("up", "Make vsockd read its configuration again."),
        "context": ("context", "Add, list, remove, suspend, migrate and power guests."),
    },
    "Programs": {
        "run": ("run", "Run an unmodified program in a context."),
        "fabric": ("fabric", "Run a command in a fabric of its own, such as a test suite."),
        "played": ("played", "Pause, snapshot, restore and break machines of a played hypervisor."),
        "connect": ("netcat", "Connect to CID:PORT, and relay standard input and output."),
        "listen": ("netcat", "Accept a connection to PORT, and relay standard input and output."),
        "forward": ("forward", "Forward each client of FROM to TO, until SIGTERM or Ctrl-C."),
        "ssh-proxy": (
            "ssh_proxy",
            "Connect to a guest's port for ssh, and hand the connection to it.",
        ),
    },
    "Virtual machines": {
        "vm": ("vm", "Run virtual machines under QEMU."),
        "device": ("device", "Serve the vSockets device of a virtual machine."),
    },
    "Watching": {
        "ls": ("ls", "List the fabric's sockets, two for each stream."),
        "top": ("top", "Show contexts, streams, rates and denials on the terminal."),
        "web": ("web.command", "Show contexts, streams, rates and denials in a browser."),
        "events": ("events", "Print events of guests, streams and vsockd until Ctrl-C."),
        "metrics": ("metrics", "Print or serve vsockd's counters in Prometheus's text format."),
        "capture": ("capture", "Record the packets of a device or a forwarder as pcap."),
        "disconnect": ("context", "Close the stream between two addresses."),
    },
    "Services": {
        "amqp": ("amqp", "Give guests access to RabbitMQ through three proxies."),
        "nfs": ("nfs", "Share folders of the host with guests over datagrams."),
        "guestinfo": ("guestinfo", "Serve VMware Tools in guests, and the variables they ask for."),
    },
    "Measuring and help": {
        "perf": ("perf", "Measure streams and datagrams over several addresses."),
        "doctor": ("doctor", "Check what this machine supports, and what to install."),
        "demo": ("demo.command", "Show the fabric at work between a host and two guests."),
        "include-dir": (
            "include_dir",
            "Print the folder of vmci_sockets.h, for a C compiler's -I.",
        ),
        "man": ("man", "Write the manual pages of all commands."),
    },
}
_COMMANDS = {name: entry for section in SECTIONS.values() for name, entry in section.items()}


class LazyGroup(Group):
    """The commands of :data:`SECTIONS`, each imported from its module when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands' names in the order of the help."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command's module and return the command, or None if the name is unknown."""
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"{__package__}.{_COMMANDS[cmd_name][0]}")
        found = getattr(module, cmd_name.replace("-", "_"))
        assert isinstance(found, click.Command)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each heading, without importing a command."""
        width = max(map(len, _COMMANDS))
        for heading, section in SECTIONS.items():
            with formatter.section(heading):
                formatter.write_dl(
                    [(name.ljust(width), text) for name, (_, text) in section.items()]
                )

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the commands and options that begin with ``incomplete``; import no command."""
        from click.shell_completion import CompletionItem

        commands = [
            CompletionItem(name, help=text)
            for name, (_, text) in _COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return commands + click.Command.shell_complete(self, ctx, incomplete)


def _print_version(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("vsockets")
        except PackageNotFoundError:
            number = "(not installed: running from its sources)"
        print(f"vsock {number}")
        context.exit()


def _install_completion(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        from . import completion

        print(completion.install(context.command))
        context.exit()


def _show_completion(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        from . import completion

        print(completion.script(context.command))
        context.exit()


@click.group(cls=LazyGroup, context_settings={"show_default": True})
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="State folder of the fabric. Default: VSOCKETS_DIR, else /run/vsock for root and "
    "$XDG_RUNTIME_DIR/vsock for others.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version.",
)
@click.option(
    "--install-completion",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_install_completion,
    help="Install completion for the calling shell: bash, zsh or fish.",
)
@click.option(
    "--show-completion",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_completion,
    help="Print the completion script of the calling shell, to install it elsewhere.",
)
def app(folder: Path | None) -> None:
    """Connect a host and its guests by vSockets, with any hypervisor and with none."""
    if folder is not None:
        from . import connect

        connect.choose(folder)
        give_folder_in_hints(folder)


def _usage(error: click.ClickException) -> str:
    """Return what is wrong with a command line: the parameter, the problem, the help to read."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    problem = error.format_message().rstrip(".")
    if isinstance(error, click.BadParameter) and error.param is not None:
        is_missing = isinstance(error, click.MissingParameter)
        problem = "missing" if is_missing else error.message.rstrip(".")
        name = error.param.get_error_hint(context).rpartition(" / ")[2].strip("'")
        if not problem.startswith(name):
            problem = f"{name}: {problem}"
    return f"{problem} (see: {context.command_path if context else 'vsock'} --help)"


def start(arguments: list[str]) -> int:
    """Run one command line and return its exit status.

    The status is 0 for success, 1 for a failure, 2 for an invalid command line and 130 after
    Ctrl-C; some commands have further ones.
    """
    if "_VSOCK_COMPLETE" in os.environ:
        from . import completion

        return completion.answer(app)
    try:
        with app.make_context("vsock", arguments or ["--help"]) as context:
            app.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of standard output has closed it.  The interpreter flushes again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("VSOCKETS_DEBUG"):
            raise
        if isinstance(error, click.ClickException):
            complain(_usage(error))
            return 2
        complain(one_line(error))
        return error.status if isinstance(error, CliError) else 1
    return 0
