"""``vsock run``."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from vsockets.testing import PrivateFabric, wait_until

from .vsock import Vsock

#: Unmodified programs of the standard library's socket.
SERVER = """
import socket
server = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
server.bind((socket.VMADDR_CID_ANY, 0xFFFFFFFF))
server.listen()
print(server.getsockname()[1], flush=True)
connection, client = server.accept()
print(client[0], connection.recv(100).decode(), flush=True)
connection.send(b"welcome")
"""
CLIENT = """
import socket, sys
client = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
client.connect((2, int(sys.argv[1])))
client.send(b"hello")
print(client.getsockname()[0], client.recv(100).decode(), isinstance(client, socket.socket))
"""
WAIT = "import socket, sys; print('here', flush=True); sys.stdin.read()"


def cids(vsock: Vsock) -> set[int]:
    return {context["cid"] for context in vsock.json("context", "ls")}


def contexts_of(fabric: PrivateFabric) -> dict[int, dict[str, object]]:
    return {context["cid"]: context for context in fabric.control.contexts()}


def test_unmodified_programs_talk(vsock: Vsock, fabric: PrivateFabric) -> None:
    server = vsock.start("run", "--cid", "host", sys.executable, "-c", SERVER)
    port = int(server.read_line())
    client = vsock("run", "--cid", "1234", "--", sys.executable, "-c", CLIENT, port)
    assert client.stdout == "1234 welcome True\n"
    assert server.finish()[0] == b"1234 hello\n"
    wait_until(lambda: 1234 not in contexts_of(fabric), "the lease to end")


def test_programs_run_in_the_context_of_the_command(vsock: Vsock, fabric: PrivateFabric) -> None:
    """As in a container, which has no more of the fabric than the folder of one guest."""
    guest = fabric.guest(1246)
    vsock.environment["VSOCKETS_CONTEXT"] = str(guest.folder)
    vsock.environment["VSOCKETS_DIR"] = str(fabric.folder / "missing")
    server = Vsock(fabric.folder).start("run", "--cid", "host", sys.executable, "-c", SERVER)
    port = int(server.read_line())
    client = vsock("run", "--", sys.executable, "-c", CLIENT, port)
    assert client.stdout == "1246 welcome True\n"
    assert server.finish()[0] == b"1246 hello\n"
    assert not (fabric.folder / "missing").exists()


def test_a_command_in_a_guest_can_create_another(vsock: Vsock, fabric: PrivateFabric) -> None:
    vsock.environment["VSOCKETS_CONTEXT"] = str(fabric.guest(1248).folder)
    done = vsock("run", "--name", "other", "--", "sh", "-c", "basename $VSOCKETS_CONTEXT")
    assert int(done.stdout) not in (2, 1248)


def test_a_context_without_vsockd_is_reported(vsock: Vsock, fabric: PrivateFabric) -> None:
    vsock.environment["VSOCKETS_CONTEXT"] = str(fabric.folder / "1247")
    message = f"vsock: vsockd is not running in {fabric.folder}/1247 (start it: vsock up)\n"
    assert vsock("run", "true", expect=1).stderr.endswith(message)


def test_a_guest_made_for_a_program_lives_as_long_as_it(
    vsock: Vsock, fabric: PrivateFabric
) -> None:
    running = vsock.start("run", "--name", "job", sys.executable, "-c", WAIT)
    running.read_line()
    (job,) = (c for c in contexts_of(fabric).values() if c["name"] == "job")
    assert job["leased"]
    running.finish()
    wait_until(lambda: job["cid"] not in contexts_of(fabric), "the lease to end")


def test_a_guest_lives_as_long_as_the_programs_children(
    vsock: Vsock, fabric: PrivateFabric
) -> None:
    script = "exec 3<&0; cat <&3 >/dev/null 2>&1 & exec 3<&-; echo left"
    running = vsock.start("run", "--cid", "1235", "sh", "-c", script)
    assert running.read_line() == "left"
    assert running.process.wait(10) == 0
    assert 1235 in contexts_of(fabric)
    running.end_of_input()
    wait_until(lambda: 1235 not in contexts_of(fabric), "the lease to end")


def test_a_guest_that_was_killed_leaves_nothing(vsock: Vsock, fabric: PrivateFabric) -> None:
    running = vsock.start("run", "--cid", "1236", sys.executable, "-c", WAIT)
    running.read_line()
    running.process.kill()
    wait_until(lambda: 1236 not in contexts_of(fabric), "the lease to end")


def test_a_guest_that_exists_stays(vsock: Vsock, fabric: PrivateFabric) -> None:
    fabric.guest(1237)
    vsock("run", "--cid", "1237", "true")
    assert 1237 in cids(vsock)


def test_a_guest_that_is_off_or_suspended(vsock: Vsock, fabric: PrivateFabric) -> None:
    fabric.guest(1238)
    for do, state, command in (
        (fabric.control.suspend, "suspended", "resume"),
        (fabric.control.power_off, "powered off", "power-on"),
    ):
        do(1238)
        line = vsock.fails("run", "--cid", "1238", "echo", "in")
        assert line == (
            f"context 1238 is {state}: no program can run in it (change that: "
            f"vsock context {command} 1238)"
        )
        vsock("context", command, "1238")
        assert vsock("run", "--cid", "1238", "echo", "in").stdout == "in\n"


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -TERM $$"], -signal.SIGTERM),
        (["sh", "-c", "kill -PIPE $$"], -signal.SIGPIPE),  # which Python ignores
    ],
)
def test_exit_status_is_the_programs(vsock: Vsock, command: list[str], status: int) -> None:
    done = vsock("run", "--cid", "host", "--", *command, expect=status)
    assert done.stderr == ""


def test_programs_that_cannot_be_run(vsock: Vsock, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("nothing to run\n")
    vsock.fail(
        ("run no-such-program", 127, "no-such-program: program not found (expected a path"),
        (f"run {plain}", 126, f"{plain}: Permission denied (expected an executable file"),
        (
            "run --cid local true",
            2,
            "--cid: 'local': expected a guest's CID, 3 to 4294967294, or host",
        ),
    )


def test_vsockd_is_started_on_demand(alone: Vsock) -> None:
    assert alone("run", "echo", "hello").stdout == "hello\n"
