"""``vsock``, put together from its commands, and what is common to them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from . import (
    amqp,
    capture,
    connect,
    context,
    device,
    disconnect,
    doctor,
    events,
    forward,
    include_dir,
    ls,
    man,
    metrics,
    netcat,
    nfs,
    perf,
    run,
    top,
    up,
    vm,
    web,
)
from .demo import command
from .errors import CliError, one_line
from .output import complain

app = typer.Typer(
    name="vsock",
    help="vSockets between a host and its guests, real or not.",
    rich_markup_mode=None,  # plain help, like that of other Unix tools
    pretty_exceptions_enable=False,  # an error is one line; VSOCKETS_DEBUG=1 for more
)
app.command("up")(up.up)
app.command("down")(up.down)
app.command("status")(up.status)
app.command("reload")(up.reload)
app.add_typer(context.app, name="context")
app.add_typer(device.app, name="device")
app.add_typer(vm.app, name="vm")
app.command("run", context_settings={"allow_interspersed_args": False})(run.run)
app.command("connect")(netcat.connect)
app.command("listen")(netcat.listen)
app.command("forward")(forward.forward)
app.command("capture")(capture.capture)
app.command("ls")(ls.ls)
app.command("disconnect")(disconnect.disconnect)
app.command("metrics")(metrics.metrics)
app.command("top")(top.top)
app.command("web")(web.web)
app.command("events")(events.events)
app.add_typer(amqp.app, name="amqp")
app.add_typer(nfs.app, name="nfs")
app.add_typer(perf.app, name="perf")
app.command("doctor")(doctor.doctor)
app.add_typer(command.app, name="demo")
app.command("include-dir")(include_dir.include_dir)
app.command("man")(man.man)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("vsockets")
        except PackageNotFoundError:
            number = "(not installed: running from its sources)"
        print(f"vsock {number}")
        raise typer.Exit


@app.callback()
def options(
    folder: Annotated[
        Path | None,
        typer.Option("--dir", metavar="DIR", help="The state folder; else VSOCKETS_DIR."),
    ] = None,
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
) -> None:
    """What goes before the command's name."""
    if folder is not None:
        connect.choose(folder)


def start(arguments: list[str]) -> int:
    """Run one command line; returns the exit status.

    0, 1 for what went wrong, 2 for a command line that makes no sense, 130 for Ctrl-C.
    """
    try:
        status = app(args=arguments or ["--help"], prog_name="vsock", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # Whoever read our output has seen enough.  The interpreter flushes once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("VSOCKETS_DEBUG"):
            raise
        # typer's usage errors; where their base class is depends on its version.
        explain = getattr(error, "format_message", None)
        if explain is not None:
            context = getattr(error, "ctx", None)
            where = context.command_path if context else "vsock"
            complain(f"{explain().rstrip('.')} (see: {where} --help)")
            return 2
        complain(one_line(error))
        return error.status if isinstance(error, CliError) else 1
    return status if isinstance(status, int) else 0
