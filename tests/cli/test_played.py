"""``vsock fabric --as`` and ``vsock played``: played hypervisors for suites in any language."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from .vsock import PROGRAM, Vsock

VSOCK = " ".join(PROGRAM)

#: Echoes one line for each client.
AGENT = """
import socket
server = socket.socket(socket.AF_VSOCK)
server.bind((socket.VMADDR_CID_ANY, 5000))
server.listen()
print("ready", flush=True)
while True:
    client, _ = server.accept()
    with client, client.makefile("rw") as lines:
        for line in lines:
            print(line, end="", file=lines, flush=True)
"""

#: A suite: connects to the agent, and expects the connection to end with a restore.
SUITE = f"""
import os, socket, subprocess, sys
def call(text):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(os.environ["VSOCKETS_PLAYED_SOCKET"])
    sock.sendall(b"CONNECT 5000\\n")
    lines = sock.makefile("rw")
    assert lines.readline().startswith("OK ")
    print(text, file=lines, flush=True)
    assert lines.readline() == text + "\\n"
    return lines
vsock, cid = {list(PROGRAM)!r}, os.environ["VSOCKETS_PLAYED_CID"]
agent = [*vsock, "run", "--cid", cid, "--", sys.executable, "-c", {AGENT!r}]
agent = subprocess.Popen(agent, stdout=subprocess.PIPE)
agent.stdout.readline()
first = call("one")
for operation in ("pause", "snapshot", "restore"):
    subprocess.run([*vsock, "played", operation, cid], check=True)
assert first.readline() == ""
second = call("two")
print("passed", flush=True)
subprocess.run([*vsock, "played", "ls"], check=True)
subprocess.run([*vsock, "played", "log"], check=True)
"""


def test_a_suite_pauses_and_restores(alone: Vsock, tmp_path: Path) -> None:
    path = tmp_path / "v"
    arguments = ("fabric", "--as", "firecracker", "--socket", path, sys.executable, "-c", SUITE)
    done = alone(*arguments)
    assert done.stderr == ""
    first, second, *rows = done.stdout.splitlines()
    assert (first, second) == ("1", "passed")  # the snapshot's number
    assert rows[1].split() == ["3", "firecracker@1.17", "running", "1", str(path)]
    assert rows[2:] == [
        "machine 3 (firecracker): paused",
        "machine 3 (firecracker): snapshot 1: connections of the source: reset",
        "machine 3 (firecracker): running",
        "machine 3 (firecracker): restored from snapshot 1: the guest's connections: reset",
    ]
    assert not path.exists()


def test_the_command_is_the_parent_of_an_enclave(alone: Vsock) -> None:
    program = "import socket; s = socket.socket(socket.AF_VSOCK); s.bind((-1, 5)); "
    program += "print(s.getsockname())"
    script = f"{sys.executable} -c '{program}'; "
    script += f"{VSOCK} run --cid $VSOCKETS_PLAYED_CID -- {sys.executable} -c '{program}'"
    done = alone("fabric", "--as", "nitro", "sh", "-c", script)
    assert (done.stdout, done.stderr) == ("(3, 5)\n(16, 5)\n", "")


def test_the_api(alone: Vsock) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl: apt install curl")
    curl = 'curl -s --unix-socket "$VSOCKETS_PLAYED"'
    calls = (
        f"{curl} http://played/machines",
        f'{curl} -d \'{{"hypervisor": "kata", "cid": 7}}\' http://played/machines',
        f"{curl} -X POST http://played/machines/7/pause",
        f'{curl} -d \'{{"name": "stall", "seed": 3}}\' http://played/machines/7/fault',
        f"{curl} http://played/log",
        f"{curl} -X POST http://played/machines/7/pause",
        f"{curl} -X POST http://played/machines/8/pause",
        f"{curl} -d '[]' http://played/machines/7/fault",
        f"{curl} -d '{{\"snapshot\": 1}}' http://played/machines/7/restore",
        f"{curl} -X DELETE http://played/machines/7",
    )
    lines = alone("fabric", "--as", "qemu", "sh", "-c", "; ".join(calls)).stdout.splitlines()
    assert '"hypervisor": "qemu"' in lines[0]
    assert '/machine-7/v.sock:1024"' in lines[1]
    assert '"state": "paused"' in lines[2]
    assert '"faults": [{"name": "stall", "seed": 3, "times": 1, "port": null}]' in lines[3]
    assert lines[4] == '["machine 7 (kata): paused"]'
    assert lines[5] == "cannot pause machine 7: it is paused (expected running)"
    assert lines[6] == "no played machine has CID 8"
    assert lines[7] == "invalid body (expected a JSON object)"
    assert lines[8] == "machine 7 has no snapshot (expected one before restore)"
    assert lines[9].startswith("not found (expected GET /log")


#: Requests with invalid values, by target, and the start of the reply.
INVALID = (
    ("machines", "{}", "hypervisor: missing"),
    ("machines", '{"hypervisor": 5}', "hypervisor: 5 is an integer, expected a string"),
    ("machines", '{"hypervisor": "kata@1..2"}', "invalid version: '1..2'"),
    ("machines", '{"hypervisor": "kata", "cid": "7"}', "cid: '7' is a string, expected an integer"),
    ("machines", '{"hypervisor": "kata", "cid": 2}', "cid: 2 is out of range, expected 3 to"),
    ("machines", '{"hypervisor": "kata", "sokcet": "/x"}', "sokcet: unknown key, did you mean"),
    ("machines", '{"hypervisor": "kata", "socket": ""}', "socket: '' is no path"),
    (
        "machines",
        '{"hypervisor": "kata", "socket": "/tmp/a\\u0000"}',
        "socket: '/tmp/a\\x00' is no path",
    ),
    (
        "machines",
        f'{{"hypervisor": "kata", "socket": "/tmp/{"ü" * 52}"}}',
        f"/tmp/{'ü' * 52}: a path of 109 bytes is too long for a unix socket (expected at most 107",
    ),
    ("machines", '{"hypervisor": "kata", "socket": "/nowhere/x"}', "/nowhere/x: No such file or"),
    ("machines", '{"hypervisor": "kata", "socket": "/"}', "/: Address already in use (remove the"),
    ("machines/3/fault", "{}", "name: missing"),
    ("machines/3/fault", '{"name": []}', "name: an array, expected a string"),
    ("machines/3/fault", '{"name": "stalled"}', "name: 'stalled' is unknown, expected no-ok, "),
    ("machines/3/fault", '{"name": "stall", "seed": "x"}', "seed: 'x' is a string, expected an"),
    ("machines/3/fault", '{"name": "stall", "times": 1.5}', "times: 1.5 is a float, expected an"),
    ("machines/3/fault", '{"name": "stall", "times": true}', "times: true is a boolean"),
    ("machines/3/fault", '{"name": "slow", "seconds": "1"}', "seconds: '1' is a string"),
    ("machines/3/fault", '{"name": "slow", "seconds": NaN}', "invalid seconds: nan"),
    ("machines/3/restore", '{"snapshot": true}', "snapshot: true is a boolean, expected an"),
    ("machines/3/restore", '{"asleep": 1e308}', "invalid seconds: 1e+308 (expected 0 to "),
    ("machines/3/restore", f'{{"asleep": {10**4000}}}', "asleep: a number of more than 64 bits is"),
    ("machines/3/clone", '{"count": 2.9}', "count: 2.9 is a float, expected an integer"),
    ("machines/3/clone", '{"count": 1000}', "count: 1000 is out of range, expected 1 to 100"),
    ("machines/3/change-cid", "{}", "cid: missing"),
    ("machines/3/change-cid", '{"cid": 61.7}', "cid: 61.7 is a float, expected an integer"),
    ("machines/3/pause", '{"now": 1}', "now: unknown key, expected no key"),
    ("machines/3/pause", "[" * 4000, "invalid body: "),
    ("machines/3/pause", '"\udce9', "invalid body: "),
)

#: Sends the requests of :data:`INVALID`, and prints the replies that are not as expected.
SEND = f"""
import os
from vsockets.testing.played import _Connection
for target, body, expected in {INVALID!r}:
    connection = _Connection(os.environ["VSOCKETS_PLAYED"])
    connection.request("POST", "/" + target, body.encode(errors="surrogateescape"))
    response = connection.getresponse()
    text = response.read().decode()
    if response.status not in (400, 409) or not text.startswith(expected):
        print(target, body[:60], response.status, text[:200])
    connection.close()
"""


def test_invalid_values(alone: Vsock) -> None:
    done = alone("fabric", "--as", "cloud-hypervisor", sys.executable, "-c", SEND)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_process_that_plays_has_ended(alone: Vsock) -> None:
    program = f"""
import os, signal, socket, struct, subprocess
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(os.environ["VSOCKETS_PLAYED"])
    option = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    os.kill(struct.unpack("3i", option)[0], signal.SIGKILL)
    try:
        sock.recv(1)
    except ConnectionResetError:
        pass
subprocess.run({[*PROGRAM, "played", "ls"]!r})
"""
    done = alone("fabric", "--as", "kata", sys.executable, "-c", program)
    assert "the process that plays machines has ended or does not answer" in done.stderr


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ("fabric --as xen true", 2, "--as: unknown hypervisor: 'xen' (expected firecracker, "),
        ("fabric --socket /tmp/x true", 2, "--socket: needs --as"),
        ("fabric --as qemu --socket /tmp/x true", 1, "qemu has no unix socket (expected no path)"),
        ("played ls", 1, "VSOCKETS_PLAYED is not set: no hypervisor is played here"),
    ],
)
def test_mistakes(alone: Vsock, line: str, status: int, message: str) -> None:
    assert message in alone(*line.split(), expect=status).stderr
