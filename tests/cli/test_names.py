"""Names and paths chosen by others add no line, row, label or link."""

from __future__ import annotations

import json
import re
import select
import subprocess
from pathlib import Path

import pytest

from daemon.raw_client import compiled, connect
from vsockets import Attachment
from vsockets.cli.web import watcher
from vsockets.model.text import printable
from vsockets.testing import PrivateFabric

from .terminal import Terminal
from .vsock import Vsock

#: A row, a terminal's escape, a link, text that runs backwards, and a label's end.
EVIL = 'a\n4   forged\x1b[2K\x1b]8;;http://evil\x07\u202eb\x85"} 7'
SHOWN = printable(EVIL)


@pytest.fixture(scope="module")
def guest(fabric: PrivateFabric) -> Attachment:
    return fabric.guest(3, name=EVIL)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program in a folder with such a name."""
    folder = tmp_path / EVIL.replace("/", "|")
    folder.mkdir()
    return compiled("request_client.c", tmp_path).rename(folder / "x")


def be_denied(program: Path, guest: Attachment) -> None:
    subprocess.run(
        [program, guest.folder / "seqpacket"],
        input=connect(4, 5000).encode(),
        stdout=subprocess.DEVNULL,
        check=True,
    )


def test_the_names_are_hostile() -> None:
    assert SHOWN.isprintable() and "\\x1b" in SHOWN and "\\u202e" in SHOWN


def test_tables(vsock: Vsock, fabric: PrivateFabric, guest: Attachment) -> None:
    lines = vsock("context", "ls").stdout.splitlines()
    assert all(line.isprintable() for line in lines)
    assert [line.split()[0] for line in lines] == ["CID", "2", "3"]
    assert SHOWN in lines[2]
    assert [row["name"] for row in vsock.json("context", "ls")] == ["host", EVIL]


@pytest.mark.parametrize("options", [(), ("--json",)])
@pytest.mark.parametrize("topic", ["denial", "context"])
def test_events(
    vsock: Vsock,
    fabric: PrivateFabric,
    guest: Attachment,
    program: Path,
    topic: str,
    options: tuple[str, ...],
) -> None:
    def happen() -> None:
        if topic == "denial":
            be_denied(program, guest)
        else:
            fabric.control.migrate(3)

    fabric.guest(4)
    running = vsock.start("events", topic, *options)
    happen()
    assert running.process.stdout is not None
    while not select.select([running.process.stdout], [], [], 0.1)[0]:
        happen()  # the command had not subscribed yet
    line = running.read_line()
    fabric.control.remove_context(4)
    chosen = str(program) if topic == "denial" else EVIL
    assert line.isprintable()
    if options:
        assert chosen in json.loads(line).values()
    else:
        assert (repr(chosen) if topic == "denial" else SHOWN) in line


def test_top(vsock: Vsock, fabric: PrivateFabric, guest: Attachment) -> None:
    with Terminal(vsock.environment, "top") as terminal:
        lines = terminal.wait_for(lambda lines: any("forge" in line for line in lines))
    assert not any(line.startswith("4 ") for line in lines)


def test_metrics(vsock: Vsock, guest: Attachment) -> None:
    text = vsock("metrics").stdout
    for line in text.splitlines():
        assert re.fullmatch(r'# .*|\w+(\{(\w+="([^"\\\n]|\\.)*",?)*\})? [-+.\w]+', line), line
    assert text.isascii()


def test_the_page() -> None:
    message = watcher.encode_event("happened", {"message": [EVIL], "cid": 3}, 1).decode()
    kind, number, data, *rest = message.split("\n")
    assert (kind, number, rest) == ("event: happened", "id: 1", ["", ""])
    assert json.loads(data.removeprefix("data: ")) == {"message": [SHOWN], "cid": 3}


def test_error_messages(vsock: Vsock) -> None:
    done = vsock("run", "--cid", "3", "--", EVIL, expect=None)
    assert all(line.isprintable() for line in done.stderr.splitlines())
    assert not any(line.startswith("4 ") for line in done.stderr.splitlines())
