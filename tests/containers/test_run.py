"""``vsock run`` below the seccomp profiles, capabilities and users of container runtimes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .runtime import TESTS

#: The ends of folders on sys.path that have vsockets and what it depends on.
WANTED = ("src", "site-packages", "dist-packages")
#: Go without downloads and the user's settings, and with a cache of its own.
GO_SETTINGS = {
    "CGO_ENABLED": "0",
    "GO111MODULE": "off",
    "GOFLAGS": "",
    "GOTOOLCHAIN": "local",
    "GOCACHE": os.path.expanduser("~/.cache/vsockets/go-build"),
}

ORDINARY_USER = ("--user", "1000", "--capabilities", "none", "--no-new-privileges")
PROGRAMS = TESTS / "supervisor" / "programs"

STREAMS_AND_DATAGRAMS = """
import os, socket, sys, threading
def make(kind): return socket.socket(40, kind)
for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
    with make(kind) as server, make(kind) as client:
        server.bind((0xFFFFFFFF, 5000))
        server.listen()
        connecting = threading.Timer(0.05, client.connect, [(1, 5000)])  # accept() waits
        connecting.start()
        accepted, (cid, _) = server.accept()
        connecting.join()
        with accepted:
            accepted.send(b"hello")
            print(kind.name, client.recv(10), cid == client.getsockname()[0])
with make(socket.SOCK_DGRAM) as server, make(socket.SOCK_DGRAM) as client:
    server.bind((0xFFFFFFFF, 6000))
    client.sendto(b"datagram", (1, 6000))
    data, source = server.recvfrom(10)
    print(data, source == client.getsockname())
sys.stdout.flush()
if os.fork() == 0:
    os.execv(sys.executable, [sys.executable, "-c", "import socket; print(socket.socket(40))"])
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""

DISCONNECTING = '''
import subprocess
from vsockets import create_connection
from vsockets.testing import PrivateFabric

LIBRARY = """
import vsockets
with vsockets.create_server((2, vsockets.VMADDR_PORT_ANY)) as server:
    print(server.getsockname()[1], flush=True)
    print(server.accept()[0].recv(1), flush=True)
"""
UNCHANGED = """
import socket
with socket.socket(40, socket.SOCK_STREAM) as server:
    server.bind((2, 0xFFFFFFFF))
    server.listen()
    print(server.getsockname()[1], flush=True)
    print(server.accept()[0].recv(1), flush=True)
"""
TRACED = """
import ctypes, vsockets
with vsockets.create_server((2, vsockets.VMADDR_PORT_ANY)) as server:
    client = vsockets.create_connection(server.getsockname())
    accepted, _ = server.accept()
    traced = ctypes.CDLL(None).ptrace(0, 0, 0, 0)  # by its parent
    print(traced, *client.getsockname(), *client.getpeername(), flush=True)
    input()
"""

def start(program, supervised):
    command = ["/usr/bin/python3", "-c", program]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    if supervised:
        return fabric.popen(fabric.host, command, **pipes)
    return subprocess.Popen(command, env=fabric.environment(fabric.host), **pipes)

def line(process):
    return process.stdout.readline().strip()

with PrivateFabric() as fabric:
    for program in (LIBRARY, UNCHANGED):
        for how in ("disconnect", "suspend"):
            guest = fabric.guest()
            server = start(program, program is UNCHANGED)
            with create_connection((2, int(line(server))), context=guest) as client:
                if how == "disconnect":
                    answer = fabric.control.disconnect(client.getsockname(), client.getpeername())
                else:
                    answer = fabric.control.suspend(client.getsockname()[0])
                print(how, answer["streams_left"], client.recv(1), line(server), server.wait())
    process = start(TRACED, False)
    done, *ends = map(int, line(process).split())
    for left in fabric.control.disconnect(tuple(ends[:2]), tuple(ends[2:]))["streams_left"]:
        print(done, left["reason"].replace(str(process.pid), "PID"))
    process.kill()
'''

SOCAT = """
$vsock run --cid host -- socat -u VSOCK-LISTEN:7000 CREATE:/tmp/received &
until $vsock ls 2>/tmp/ls | grep -q 7000; do :; done
echo "by socat" | $vsock run -- socat -u - VSOCK-CONNECT:2:7000
wait $!
cat /tmp/received
"""

GO = """
mkfifo /tmp/port
$vsock run --cid 91 -- PROGRAM serve 8 >/tmp/port &
read port </tmp/port
$vsock run --cid host -- PROGRAM call 91 $port 8
wait $!
"""


@pytest.fixture(params=["docker", "kubernetes", "podman"])
def profile(request: pytest.FixtureRequest) -> str:
    """A container runtime's profile."""
    return str(request.param)


@pytest.fixture(params=[(), ORDINARY_USER], ids=["root", "ordinary user"])
def user(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Options for a container's user."""
    options: tuple[str, ...] = request.param
    return options


def everybody_may_read(folder: str) -> bool:
    """Return whether users other than the owner can read a folder."""
    path = Path(folder).resolve()
    return bool(path.stat().st_mode & 0o004) and all(
        parent.stat().st_mode & 0o001 for parent in (path, *path.parents)
    )


def in_container(
    profile: str, user: tuple[str, ...], *options: str
) -> tuple[list[str], dict[str, str]]:
    """Return the beginning of a command that runs another in a container, and its environment.

    Skips the test if the container's user could not read the working tree.
    """
    folders = [path for path in sys.path if path.endswith(WANTED)]
    if user and not all(map(everybody_may_read, folders)):
        pytest.skip(f"needs a working tree that every user can read: {folders}")
    for folder in folders:
        if folder.startswith("/tmp/"):  # the container has another /tmp
            options += ("--keep", folder)
    environment = {
        **os.environ,
        "HOME": "/tmp",
        "VSOCKETS_DIR": "/tmp/fabric",
        # Debian's Python is one that every user may execute.
        "PYTHONPATH": os.pathsep.join(folders),
        "vsock": "/usr/bin/python3 -m vsockets.cli",
    }
    del environment["VSOCKETS_INTERCEPTOR"]
    runtime = (sys.executable, "-m", "containers.runtime", "--profile", profile)
    return [*runtime, *user, *options, "--"], environment


def contained(
    profile: str,
    user: tuple[str, ...],
    script: str,
    *options: str,
    arguments: tuple[str, ...] = (),
    data: str = "",
) -> tuple[list[str], list[str]]:
    """Run a shell script in a container, in which ``$vsock`` is the command line.

    ``arguments`` are its ``$0`` and so on, ``data`` is its standard input.  Returns the lines of
    its output and of its standard error.
    """
    command, environment = in_container(profile, user, *options)
    done = subprocess.run(
        [*command, "sh", "-c", script, *arguments],
        input=data,
        capture_output=True,
        text=True,
        check=False,
        cwd=TESTS,
        env=environment,
        timeout=120,
    )
    if "new name spaces: " in done.stderr:
        pytest.skip("needs root, or user name spaces")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr.splitlines()


@pytest.fixture(scope="module")
def go_echo() -> Iterator[Path]:
    """A static echo service in Go, which every user may execute."""
    if shutil.which("go") is None:
        pytest.skip("no go: apt install what .ci/run does")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        made = folder / "echo"
        command: list[str | Path] = ["go", "build", "-o", made, PROGRAMS / "echo.go"]
        subprocess.run(command, env={**os.environ, **GO_SETTINGS}, check=True)
        yield made


def test_streams_packets_datagrams_and_children_work(profile: str, user: tuple[str, ...]) -> None:
    script = f"$vsock run -v -- /usr/bin/python3 -c '{STREAMS_AND_DATAGRAMS}'"
    lines, errors = contained(profile, user, script)
    reason = "a seccomp filter refuses AF_VSOCK (EPERM)"
    assert errors == [f"vsock run: interceptor trace: {reason}"]
    assert lines[:3] == [
        "SOCK_STREAM b'hello' True",
        "SOCK_SEQPACKET b'hello' True",
        "b'datagram' True",
    ]
    assert lines[3].startswith("<socket.socket fd=3, family=")
    assert lines[4:] == ["0"]


def test_streams_of_any_program_are_disconnected(profile: str, user: tuple[str, ...]) -> None:
    """Of the library's and of unchanged ones; for what cannot be ended vsockd has a reason."""
    lines, errors = contained(profile, user, f"/usr/bin/python3 -c '{DISCONNECTING}'")
    ended = [f"{how} [] b'' b'' 0" for how in ("disconnect", "suspend")]
    # Podman allows pidfd_getfd.
    left = [] if profile == "podman" else ["0 process PID is traced by process 2"]
    assert lines == [*ended, *ended, *left], errors


def test_doctor_tells_how_streams_are_closed(profile: str) -> None:
    lines, _ = contained(profile, (), "$vsock doctor --json")
    finding = next(one for one in json.loads("\n".join(lines)) if one["what"] == "pidfd_getfd")
    if profile == "podman":
        assert finding["state"] == "yes"
    else:
        assert finding["state"] == "partly"
        assert "vsockd closes streams by ptrace instead" in finding["detail"]


def test_a_container_ends_with_its_process_1() -> None:
    assert contained("docker", (), "exec $vsock run -- echo done") == (["done"], [])


def test_socat_works(profile: str, user: tuple[str, ...]) -> None:
    if shutil.which("socat") is None:
        pytest.skip("no socat: apt install what .ci/run does")
    assert contained(profile, user, SOCAT) == (["by socat"], [])


def test_a_static_go_program_works(profile: str, user: tuple[str, ...], go_echo: Path) -> None:
    script = GO.replace("PROGRAM", str(go_echo))
    assert contained(profile, user, script, "--keep", str(go_echo.parent)) == (["echoed"], [])


@pytest.mark.parametrize("call", ["ptrace", "process_vm_readv"])
def test_where_tracing_is_forbidden_the_error_names_the_remedy(profile: str, call: str) -> None:
    script = "$vsock run -- echo started || true"
    lines, (error,) = contained(profile, (), script, "--forbid", call)
    assert lines == []
    assert "cannot supervise echo: ptrace or process_vm_readv is forbidden" in error
    assert "vsock doctor --seccomp-profile docker|podman|kubernetes" in error


def test_below_doctors_profile_programs_run(profile: str, user: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        path = Path(folder, "profile.json")
        command = [sys.executable, "-m", "vsockets.cli", "doctor", "--seccomp-profile", profile]
        path.write_text(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        script = f"$vsock run -v -- /usr/bin/python3 -c '{STREAMS_AND_DATAGRAMS}'"
        lines, errors = contained(str(path), user, script)
        assert "interceptor trace: a seccomp filter refuses AF_VSOCK" in errors[0]
        assert lines[2:3] + lines[4:] == ["b'datagram' True", "0"]
