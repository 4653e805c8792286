"""The table of commands in ``app``, and what starting ``vsock`` imports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import click
import pytest

import vsockets
from vsockets.cli.app import SECTIONS, app
from vsockets.cli.groups import first_sentence

from .vsock import PATIENCE, Vsock

COMMANDS = {name: text for section in SECTIONS.values() for name, (_, text) in section.items()}

#: Packages that take long to import.
HEAVY = ("rich", "h11", "asyncio", "importlib.metadata", "subprocess", "vsockets.testing")


@pytest.mark.parametrize("name", COMMANDS)
def test_table_of_commands_matches_the_modules(name: str) -> None:
    command = app.get_command(click.Context(app), name)
    assert command is not None
    assert command.name == name
    assert first_sentence(command.help or "").startswith(COMMANDS[name].rstrip("."))


@pytest.mark.parametrize("command", [[], ["context"], ["vm"], ["demo"]])
def test_help_shows_whole_sentences(alone: Vsock, command: list[str]) -> None:
    alone.environment["COLUMNS"] = "80"
    text = alone(*command, "--help").stdout
    assert "..." not in text.replace("[ARGS]...", "")
    if not command:
        flat = re.sub(r"\s+", " ", text)
        assert all(sentence in flat for sentence in COMMANDS.values())
        assert all(f"\n{heading}:\n" in text for heading in SECTIONS)


def test_every_option_of_every_command_has_a_help_text() -> None:
    def check(command: click.Command, words: str) -> None:
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, (words, parameter.name)
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                below = command.get_command(context, name)
                assert below is not None
                check(below, f"{words} {name}")

    check(app, "vsock")


def imported(*arguments: str, environment: dict[str, str]) -> set[str]:
    """Return the modules that ``vsock`` has imported when it ends or becomes another program."""
    script = (
        "import os, sys; from vsockets.cli import main\n"
        "def execute(*_): print(*sys.modules); os._exit(0)\n"
        "os.execvpe = execute; code = main(); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("arguments", [("--help",), ("include-dir",)])
def test_small_commands_import_no_other(vsock: Vsock, arguments: tuple[str, ...]) -> None:
    modules = imported(*arguments, environment=vsock.environment)
    ours = {name for name in modules if name.startswith("vsockets.cli.")}
    allowed = {"app", "errors", "groups", "output", "include_dir"}
    assert ours <= {f"vsockets.cli.{name}" for name in allowed}
    assert not modules.intersection(HEAVY)


@pytest.mark.parametrize("arguments", [("ls",), ("run", "--cid", "local", "--", "true")])
def test_frequent_commands_import_no_event_loop(vsock: Vsock, arguments: tuple[str, ...]) -> None:
    modules = imported(*arguments, environment=vsock.environment)
    assert "vsockets.cli.connect" in modules
    assert not modules.intersection({"asyncio", "ssl", "vsockets.forward"})


def test_a_package_without_dependencies_imports_and_vsock_names_what_is_missing(
    tmp_path: Path,
) -> None:
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv/bin/python"
    (site,) = (tmp_path / "venv/lib").glob("python3*/site-packages")
    # What pip install --no-deps leaves in a virtual environment.
    (site / "vsockets").symlink_to(Path(vsockets.__file__).parent)
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONPATH"}
    subprocess.run(
        [python, "-I", "-c", "import vsockets"], check=True, timeout=PATIENCE, env=environment
    )
    done = subprocess.run(
        [python, "-I", "-m", "vsockets.cli", "--version"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env=environment,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"vsock: the Python package click is missing: pip install .+\n", done.stderr
    )
