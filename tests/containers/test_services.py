"""The library, vsockd, ``vsock forward``, hybrid vsock, the pytest fixture and the demonstration in
containers: with host and guest in one, and in two that share the guest's folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .test_run import (
    ORDINARY_USER,
    contained,
    go_echo,
    in_container,
    profile,
    user,
)

__all__ = ["go_echo", "profile", "user"]

HERE = Path(__file__).parent

#: A host: vsockd with guest 5, a stream server and a datagram server.  Reads the port of a server
#: in the guest, which it connects to.
HOST = """
import socket, sys, vsockets
from vsockets.testing import PrivateFabric
with PrivateFabric(sys.argv[1]) as fabric:
    fabric.guest(5)
    with (
        vsockets.create_server((2, 5000), context=fabric.host) as server,
        vsockets.socket(type=socket.SOCK_DGRAM, context=fabric.host) as datagrams,
    ):
        datagrams.bind((2, 6000))
        print("ready", flush=True)
        while port := sys.stdin.readline():
            guest, (cid, _) = server.accept()
            with guest:
                guest.sendall(b"welcome")
            data, source = datagrams.recvfrom(100)
            print("host:", cid, data, source[0], flush=True)
            with vsockets.create_connection((5, int(port)), context=fabric.host) as connection:
                connection.sendall(b"hello")
"""

#: A guest: prints the port of its server first.
GUEST = """
import socket, sys
{make}
with make(socket.SOCK_STREAM) as server:
    server.bind((0xFFFFFFFF, 0xFFFFFFFF))
    server.listen()
    print(server.getsockname()[1], flush=True)
    with make(socket.SOCK_STREAM) as stream, make(socket.SOCK_DGRAM) as sender:
        stream.connect((2, 5000))
        print("guest:", stream.recv(100), flush=True)
        sender.sendto(b"datagram", (2, 6000))
    with server.accept()[0] as accepted:
        print("guest:", accepted.recv(100))
"""
LIBRARY = "import vsockets\ndef make(kind): return vsockets.socket(type=kind)"
UNMODIFIED = "def make(kind): return socket.socket(40, kind)"


@pytest.fixture
def volume(user: tuple[str, ...]) -> Iterator[Path]:
    """A folder that containers share; it belongs to their user."""
    with tempfile.TemporaryDirectory(prefix="vol-", dir="/tmp") as name:
        if user and os.geteuid() == 0:
            os.chown(name, 1000, 1000)
        yield Path(name)


def test_each_part_works(profile: str, user: tuple[str, ...]) -> None:
    script = (HERE / "services.py").read_text()
    lines, errors = contained(profile, user, '/usr/bin/python3 -c "$0"', arguments=(script,))
    assert lines == [f"all parts work for user {1000 if user else 0}"]
    assert [line for line in errors if "hybrid vsock at" not in line] == []


def test_root_without_capabilities() -> None:
    """As with ``--cap-drop=ALL``: devices cannot change their user, and remain root's."""
    script = (HERE / "services.py").read_text()
    root = ("--capabilities", "none")
    lines, _ = contained("docker", root, '/usr/bin/python3 -c "$0"', arguments=(script,))
    assert lines == ["all parts work for user 0"]
    run = "$vsock run --interceptor trace -- /usr/bin/python3 -c 'import socket; socket.socket(40)'"
    assert contained("docker", root, run) == ([], [])


@pytest.mark.parametrize(
    ("profile", "user"), [("docker", ()), ("kubernetes", ORDINARY_USER)], ids=["root", "user 1000"]
)
def test_the_pytest_fixture_works(profile: str, user: tuple[str, ...], go_echo: Path) -> None:
    script = """
    cat >/tmp/agents.py
    export AGENT="$0" PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTEST_ADDOPTS=
    cd /tmp
    exec /usr/bin/python3 -m pytest -q -p vsockets.testing.plugin agents.py </dev/null
    """
    test = (HERE / "go_agent.py").read_text()
    keep = ("--keep", str(go_echo.parent))
    lines, _ = contained(profile, user, script, *keep, arguments=(str(go_echo),), data=test)
    assert lines[-1].startswith("1 passed in ")


def test_the_demonstration_works() -> None:
    lines, _ = contained("kubernetes", ORDINARY_USER, "$vsock demo --json")
    assert json.loads("".join(lines))["ok"]


def test_two_containers_share_a_guests_folder(
    profile: str, user: tuple[str, ...], volume: Path
) -> None:
    fabric = volume / "fabric"
    host, environment = in_container(profile, user, "--read-only", "--keep", str(volume))
    with subprocess.Popen(
        [*host, "/usr/bin/python3", "-c", HOST, str(fabric)],
        env=environment,
        cwd=HERE.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdin is not None and running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        inside, environment = in_container(profile, user, "--keep", str(fabric / "5"))
        environment["VSOCKETS_CONTEXT"] = str(fabric / "5")
        for make, vsock in ((LIBRARY, ()), (UNMODIFIED, ("-m", "vsockets.cli", "run"))):
            python = ("/usr/bin/python3", *vsock, *("/usr/bin/python3",) * bool(vsock))
            with subprocess.Popen(
                [*inside, *python, "-c", GUEST.format(make=make)],
                env=environment,
                cwd=HERE.parent,
                stdout=subprocess.PIPE,
                text=True,
            ) as guest:
                assert guest.stdout is not None
                running.stdin.write(guest.stdout.readline())
                running.stdin.flush()
                assert guest.stdout.read() == "guest: b'welcome'\nguest: b'hello'\n"
            assert guest.returncode == 0
            assert running.stdout.readline() == "host: 5 b'datagram' 5\n"
        running.stdin.close()
    assert running.returncode == 0
