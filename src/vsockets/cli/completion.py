"""Shell completion: ``vsock --install-completion`` and ``--show-completion``.

click writes the scripts; they call ``vsock`` with ``_VSOCK_COMPLETE`` set when Tab is pressed.
"""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class, shell_complete

from ..model.home import home_folder
from .errors import CliError

_VARIABLE = "_VSOCK_COMPLETE"

#: By shell: the file of the script, below the home folder.
_FILES = {
    "bash": ".bash_completions/vsock.sh",
    "zsh": ".zfunc/_vsock",
    "fish": ".config/fish/completions/vsock.fish",
}

#: By shell: its start-up file, and the line in it that loads the script.  fish needs none.
_LOADERS = {
    "bash": (".bashrc", "source '{script}'"),
    "zsh": (".zshrc", "fpath+=~/.zfunc; autoload -Uz compinit; compinit"),
}


def answer(command: click.Command) -> int:
    """Print the completions that a shell's script asks for, and return the exit status."""
    return shell_complete(command, {}, "vsock", _VARIABLE, os.environ[_VARIABLE])


def script(command: click.Command) -> str:
    """Return the completion script for the shell that called this process.

    Raises CliError if the shell is unknown.
    """
    return _script(command, _shell())


def install(command: click.Command) -> str:
    """Write the completion script to the user's home folder, and return a message about it.

    Raises CliError if the shell is unknown.
    """
    shell = _shell()
    home = home_folder()
    file = home / _FILES[shell]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_script(command, shell) + "\n")
    if shell in _LOADERS:
        name, line = _LOADERS[shell]
        line = line.format(script=file)
        startup = home / name
        text = startup.read_text() if startup.exists() else ""
        if line not in text.splitlines():
            startup.write_text(f"{text.rstrip()}\n\n{line}\n".lstrip())
    return f"{shell} completion installed in {file}; it works in new shells"


def _script(command: click.Command, shell: str) -> str:
    kind = get_completion_class(shell)
    assert kind is not None
    return kind(command, {}, "vsock", _VARIABLE).source().strip()


def _shell() -> str:
    """Return the name of the nearest ancestor process that is a known shell, else of $SHELL."""
    pid = os.getppid()
    while pid > 1:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except OSError:
            break
        name = stat[stat.index("(") + 1 : stat.rindex(")")].lstrip("-")
        if name in _FILES:
            return name
        pid = int(stat[stat.rindex(")") + 2 :].split()[1])
    name = os.path.basename(os.environ.get("SHELL", ""))
    if name not in _FILES:
        raise CliError(f"unsupported shell: {name!r} (expected bash, zsh or fish)")
    return name
