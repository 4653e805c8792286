"""Every invalid value is reported with its parameter and what was expected."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import click
import pytest

from vsockets.cli.app import app, start

#: Values that arguments before an invalid one get, by their names in messages.
VALID = {"CID": "3", "CID:PORT": "3:5", "FROM": "vsock::5", "SERVER": "udp:host:5"}

#: Types for which every text is valid, or whose value is used only later: programs and paths.
ANY_TEXT = (click.types.StringParamType, click.types.UnprocessedParamType, click.Path)


def commands(
    command: click.Command, *words: str
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield each command without subcommands, and the words that call it."""
    if not isinstance(command, click.Group):
        yield words, command
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        assert found is not None
        yield from commands(found, *words, name)


def mistakes() -> Iterator[tuple[str, str]]:
    """Yield command lines with one invalid value, and the name of its parameter."""
    for words, command in commands(app):
        before: list[str] = []
        for parameter in command.params:
            if isinstance(parameter, click.Argument):
                name = parameter.get_error_hint(None)
                if not isinstance(parameter.type, ANY_TEXT):
                    yield shlex.join([*words, *before, "?"]), name
                before.append(VALID.get(name, "x"))
            elif not isinstance(parameter.type, (*ANY_TEXT, click.types.BoolParamType)):
                name = max(parameter.opts, key=len)
                yield shlex.join([*words, name, "?"]), name


MISTAKES = list(mistakes())


def test_the_walk_reaches_all_kinds() -> None:
    lines = [line for line, _ in MISTAKES]
    assert len(lines) > 60
    for line in ("connect '?'", "forward '?'", "vm run --memory '?'", "context ft 3 '?'"):
        assert line in lines


@pytest.mark.parametrize(("line", "name"), MISTAKES)
def test_an_invalid_value(line: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(shlex.split(line)) == 2
    found = capsys.readouterr().err
    assert found.startswith(f"vsock: {name}")
    assert any(word in found for word in ("expected", "is not one of", "is not a valid")), found


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("forward", "FROM TO --config"),
        ("forward --config x vsock::5 tcp:host:5", "--config FROM TO"),
        ("forward tcp::0 http-proxy:", "FROM TO --allow-host"),
        ("capture -w x", "FROM TO --context"),
        ("capture -w x tcp::0 tcp:host:5", "FROM TO"),
        ("capture -w x --port 5 vsock::5 tcp:host:5", "--port --context"),
        ("capture -w x --context 3 vsock::5 tcp:host:5", "--context FROM TO --allow"),
        (f"device hybrid --socket {'x' * 200}", "--socket"),
        ("context add --domain lab", "--domain --profile"),
        ("context add --vmx /nowhere", "--vmx"),
        ("vm args --socket x --vmx /nowhere", "--vmx"),
        ("listen 5 -u --seqpacket", "--datagram --seqpacket"),
        ("listen 5 -u -e cat", "--exec"),
        ("connect 3 5 -e ''", "--exec"),
        ("ls -l --state bound", "--listening --state"),
        ("run --cid host --reserved-ports true", "--reserved-ports"),
        ("fabric --hybrid 3=x --hybrid 3=y true", "--hybrid"),
        ("amqp proxy --node vsock:3:5", "--node"),
        ("amqp proxy --node tcp:host:5 --tls-ca x", "--tls-ca --tls-cert"),
        ("nfs serve --export / --listen tcp:host:5", "--listen"),
        ("nfs mount tcp:host:5 / x", "SERVER"),
        ("metrics --listen tcp:0.0.0.0:5", "--listen"),
        ("web --listen unix:x", "--listen"),
        ("perf run --test datagrams tcp:host:5", "--test ADDRESS"),
        ("connect 3", "PORT"),
        ("device vmci", "--socket"),
    ],
)
def test_invalid_combinations(line: str, names: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(shlex.split(line)) == 2
    found = capsys.readouterr().err
    assert all(name in found for name in names.split()), found
    assert any(word in found for word in ("expected", "need", "missing", "not ", "exclude")), found


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("runn true", "no command 'runn' (expected run?) (see: vsock --help)"),
        ("help", "no command 'help' (see: vsock --help)"),
        ("context ad", "no command 'ad' (expected add?) (see: vsock context --help)"),
        ("run", "PROGRAM: missing (see: vsock run --help)"),
        ("run --cid abc true", "--cid: 'abc': expected a guest's CID, 3 to 4294967294, or host"),
        ("run --cid 1 true", "--cid: '1': expected a guest's CID, 3 to 4294967294, or host"),
        ("fabric --cid any true", "--cid: 'any': expected a guest's CID, 3 to 4294967294, or host"),
        ("fabric --guest 2 true", "--guest: '2': expected a guest's CID, 3 to 4294967294"),
        ("context add host", "CID: 'host': expected a guest's CID, 3 to 4294967294"),
        ("connect 2:22", "CID '2:22': expected CID and PORT as two arguments"),
        ("connect 2", "PORT: missing"),
        ("connect 2 any", "any is not a destination (expected a number)"),
        ("connect any 22", "any is not a destination (expected a number)"),
        ("connect 2 22 --wait -1", "--wait: '-1': expected a number of seconds from 0"),
        ("connect 2 22 -w nan", "--timeout: 'nan': expected a number of seconds from 0"),
        ("ls --pid few", "--pid: 'few': expected a whole number from 0"),
        ("top", "standard output is not a terminal (expected one, or --json)"),
        ("vm run", "nothing to boot (expected --kernel, --disk, --vmx"),
        ("vm run --initrd /dev/null", "--initrd and --append need --kernel"),
    ],
)
def test_mistakes_of_a_newcomer(line: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(shlex.split(line)) == 2
    found = capsys.readouterr().err
    assert found.startswith(f"vsock: {text}") and found.count("\n") == 1, found


@pytest.mark.parametrize(
    "words", ["doctor --seccomp-profile", "context add --owner", "vm args --cid"]
)
def test_an_option_without_its_value(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, _, option = words.rpartition(" ")
    assert start(words.split()) == 2
    expected = f"vsock: Option '{option}' requires an argument (see: vsock {command} --help)\n"
    assert capsys.readouterr().err == expected
