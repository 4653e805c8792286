"""``vsock fabric``: a command in a fabric that ends with it."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import c_compiler
from vsockets.cli.include_dir import INCLUDE
from vsockets.testing import wait_until

from .vsock import PATIENCE, PROGRAM, Vsock

PROGRAMS = Path(__file__).parent / "programs"
VSOCK = " ".join(PROGRAM)
#: Prints the fabric's folder, leaves a process in the background, and waits.
LEAVES = 'sleep 600 & echo "$! $VSOCKETS_DIR"; exec cat'
SERVER = """
import socket, subprocess, sys
server = socket.socket(socket.AF_VSOCK)
server.bind((socket.VMADDR_CID_ANY, 5000))
server.listen()
client = "import socket; s = socket.socket(socket.AF_VSOCK); s.connect((2, 5000)); s.send(b'x')"
running = subprocess.Popen([*sys.argv[1:], "--", sys.executable, "-c", client])
connection, (cid, _) = server.accept()
print(cid, connection.recv(9).decode(), running.wait(), flush=True)
sys.stdin.read()
"""
#: Makes sockets for ever, and notes each failure; tells that it has begun.
LOOP = """
import socket, sys
with open(sys.argv[1], "a", buffering=1) as seen:
    socket.socket(socket.AF_VSOCK).close()
    open(sys.argv[2], "a").write("begun")
    while True:
        try:
            socket.socket(socket.AF_VSOCK).close()
        except OSError as error:
            print(error, file=seen)
"""
#: Requests that no vsock run makes; the last program gets a message that none sends.
MALFORMED = """
import os, socket, vsockets.cli.delegation as one
def connect():
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel.connect(os.environ[one.LAUNCHER])
    return channel
connect().close()
connect().send(b"r")
for text in (b"", b"[]", b"{}", b"[" * 100_000, b'{"pid": 1}'):
    with connect() as channel, os.fdopen(os.memfd_create("x"), "w+b", buffering=0) as file:
        file.write(text)
        socket.send_fds(channel, [b"r"], [0, file.fileno()])
        channel.recv(9)
for message in (b"x", one.MESSAGE.pack(one.SIGNAL, 999)):
    with connect() as channel:
        one._send_request(channel, {"program": ["sleep", "600"], "cid": 3})
        channel.recv(9)
        channel.send(message)
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def left_by(line: str) -> tuple[int, Path]:
    pid, folder = line.split()
    return int(pid), Path(folder).parent


@pytest.fixture
def go(tmp_path: Path, alone: Vsock) -> Vsock:
    """The command line where ``go test`` works in ``tmp_path``, without downloads."""
    if shutil.which("go") is None:
        pytest.skip("no go: apt install what .ci/run does")
    shutil.copy(PROGRAMS / "agent_test.go", tmp_path)
    (tmp_path / "go.mod").write_text("module agent\n")
    alone.environment |= {
        "CGO_ENABLED": "0",
        "GOFLAGS": "-mod=mod",
        "GOPROXY": "off",
        "GOTOOLCHAIN": "local",
        "GOCACHE": os.path.expanduser("~/.cache/vsockets/go-build"),
        "VSOCK": VSOCK,
    }
    return alone


def test_go_test_runs_with_an_agent_in_a_guest(go: Vsock, tmp_path: Path) -> None:
    script = f"cd {tmp_path} && exec go test -count=1 -v"
    done = go("fabric", "--", "sh", "-c", script, expect=None)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--- PASS: TestAgent" in done.stdout
    assert "--- PASS: TestServed" in done.stdout
    assert done.stderr == ""
    go.environment["FAIL"] = "1"
    in_guest = ("fabric", "--cid", "7", "--guest", "99", "--", "sh", "-c")
    done = go(*in_guest, f"{script} -run Denied", expect=1)
    assert "cannot connect: no route to host" in done.stdout
    assert "denied: connect 7:any to 99:5000" in done.stderr


def test_a_suite_in_c_runs_with_its_other_half_in_a_guest(tmp_path: Path, alone: Vsock) -> None:
    suite = tmp_path / "suite"
    c_compiler.compile_c(f"-I{INCLUDE}", "-o", suite, PROGRAMS / "suite.c")
    done = alone("fabric", "--", suite, *PROGRAM, "run", "--cid", "3", "--")
    assert (done.stdout, done.stderr) == ("3 ready\n", "")


@pytest.mark.parametrize("interceptor", ["notify", "trace"])
def test_the_other_side_runs_by_either_interceptor(alone: Vsock, interceptor: str) -> None:
    alone.environment["VSOCKETS_INTERCEPTOR"] = interceptor
    done = alone("fabric", sys.executable, "-c", SERVER, *PROGRAM, "run", "--cid", "4")
    assert (done.stdout, done.stderr) == ("4 x 0\n", "")


def test_parallel_runs_have_separate_fabrics(alone: Vsock) -> None:
    """Each binds port 5000 of the host and holds it until all have it."""
    command = ("fabric", sys.executable, "-c", SERVER, *PROGRAM, "run", "--cid", "4")
    running = [alone.start(*command) for _ in range(3)]
    assert [one.read_line() for one in running] == ["4 x 0"] * 3
    for one in running:
        one.finish()


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 7", 7), ("kill -TERM $$", -signal.SIGTERM), (f"{VSOCK} run sh -c 'exit 9'", 9)],
)
def test_status_is_the_commands_and_a_failure_shows_the_log(
    alone: Vsock, script: str, status: int
) -> None:
    """The log has a title; an empty one is not shown, nor is its title."""
    assert alone("fabric", "--", "sh", "-c", script, expect=status).stderr == ""
    denied = f"! {VSOCK} run --cid 7 {VSOCK} connect 99 5000 2>/dev/null || exit 1; {script}"
    done = alone("fabric", "--guest", "99", "--", "sh", "-c", denied, expect=status)
    title, line = done.stderr.splitlines()
    how = f"signal {-status}" if status < 0 else f"status {status}"
    assert title == f"vsock: fabric: the command ended with {how}; vsockd's log:"
    assert "denied: connect 7:any to 99:5000" in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_leaves_nothing(alone: Vsock, number: signal.Signals) -> None:
    running = alone.start("fabric", "--", "sh", "-c", LEAVES)
    pid, folder = left_by(running.read_line())
    running.process.send_signal(number)
    assert running.process.wait(PATIENCE) == -number
    if number is signal.SIGKILL:  # the others wait for all to be removed
        wait_until(lambda: not folder.exists() and not is_running(pid), "all to be removed")
    else:
        assert not is_running(pid)
        assert not folder.exists()


def test_programs_left_in_a_guest_end_with_the_command(alone: Vsock) -> None:
    script = f"{VSOCK} run --cid 3 sh -c 'sleep 600 >/dev/null & echo $! $VSOCKETS_DIR'"
    pid, folder = left_by(alone("fabric", "--", "sh", "-c", script).stdout)
    assert not is_running(pid)
    assert not folder.exists()


@pytest.mark.parametrize("where", ["", f"{VSOCK} run --cid 3"], ids=["host", "guest"])
def test_programs_left_have_sockets_to_their_end(alone: Vsock, tmp_path: Path, where: str) -> None:
    """A supervisor outlives them: without one the kernel would answer with ENOSYS."""
    seen, begun = tmp_path / "seen", tmp_path / "begun"
    (tmp_path / "loop.py").write_text(LOOP)
    loop = f"{sys.executable} {tmp_path}/loop.py {seen} {begun}"
    script = f"for i in 1 2 3 4; do {loop} & done; until [ -s {begun} ]; do sleep 0.02; done"
    alone("fabric", "--", "sh", "-c", f"{where} sh -c {shlex.quote(script)}")
    assert begun.exists()
    assert seen.read_text() == ""


def test_a_fabric_works_as_process_1(alone: Vsock) -> None:
    """As in a container without an init: the keeper is a child of the command's process."""
    unshare = ["unshare", "--pid", "--fork", "--mount-proc"]
    unshare += ["--user", "--map-root-user"] * bool(os.geteuid())
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "true"], check=False).returncode
    ):
        pytest.skip("needs a pid namespace")
    done = subprocess.run(
        [*unshare, *PROGRAM, "fabric", "--", "sh", "-c", "sleep 600 & echo $VSOCKETS_DIR; exit 7"],
        env=alone.environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (7, "")
    assert not Path(done.stdout.strip()).parent.exists()


def test_a_killed_keeper_leaves_nothing(alone: Vsock) -> None:
    script = f"""
        {VSOCK} run --cid 3 sh -c '
            sleep 600 >/dev/null & echo $! $VSOCKETS_DIR; exec sleep 600 >/dev/null' &
        {VSOCK} run --cid 4 sh -c 'sleep 600 >/dev/null & echo $! $VSOCKETS_DIR'
        {LEAVES}
    """
    running = alone.start("fabric", "--", "sh", "-c", script)
    left = [left_by(running.read_line()) for _ in range(3)]
    _, folder = left[0]
    vsockd = int((folder / "fabric/vsockd.lock").read_text())
    stat = Path(f"/proc/{vsockd}/stat").read_text()
    os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)
    assert "the process that kept the fabric was killed" in running.finish(expect=1)[1]
    assert not folder.exists()
    assert not is_running(vsockd)
    wait_until(lambda: not any(is_running(pid) for pid, _ in left), "the programs to end")


def test_the_status_stays_the_commands_when_the_log_cannot_be_printed(alone: Vsock) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    running = alone.start("fabric", "--", "sh", "-c", "exit 7", stderr=writer)
    os.close(writer)
    assert running.process.wait(PATIENCE) == 7


def test_malformed_requests_do_not_end_the_fabric(alone: Vsock, tmp_path: Path) -> None:
    program = tmp_path / "malformed.py"
    program.write_text(MALFORMED)
    script = f"{sys.executable} {program} && {VSOCK} run --cid 3 echo works"
    assert alone("fabric", "--", "sh", "-c", script).stdout == "works\n"


def test_signals_and_descriptors_reach_a_program_of_vsock_run(alone: Vsock, tmp_path: Path) -> None:
    # The shell of the guest waits on descriptor 5, a pipe that nobody writes to.
    agent = """trap "echo got; exit 9" TERM; echo in; read x <&5"""
    script = f"""
        mkfifo {{0}}; exec 5<>{{0}}
        {VSOCK} run --cid 3 sh -c '{agent}' & read x; kill -TERM $!; wait $!; echo $?
    """
    running = alone.start("fabric", "--", "sh", "-c", script.format(tmp_path / "pipe"))
    assert running.read_line() == "in"
    running.write(b"\n")
    assert [running.read_line() for _ in range(2)] == ["got", "9"]
    running.finish()


def test_a_hybrid_guest_is_reached_at_its_socket(alone: Vsock, tmp_path: Path) -> None:
    path = tmp_path / "hybrid"
    script = f"{VSOCK} run --cid 5 {VSOCK} listen any"
    running = alone.start("fabric", "--guest", "6", "--hybrid", f"5={path}", "sh", "-c", script)
    port = running.port()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(path))
        client.sendall(b"CONNECT %d\n" % port)
        assert client.recv(100).startswith(b"OK ")
        client.sendall(b"hello\n")
        assert running.read_line() == "hello"
    running.finish()
    assert not path.exists()


def test_command_lines_that_cannot_be_run(alone: Vsock) -> None:
    alone.fail(
        ("fabric --hybrid 5 true", 2, "invalid guest and path: '5' (expected CID=PATH)"),
        ("fabric --hybrid 5=/tmp/a --hybrid 5=/tmp/b true", 2, "--hybrid: two paths for one guest"),
        ("fabric --guest host true", 2, "--guest: 'host': expected a guest's CID"),
        ("fabric --hybrid host=/tmp/a true", 2, "'host': expected a guest's CID, 3 to"),
        (
            "fabric --hybrid 5=/missing/a true",
            1,
            "vsock: hybrid: /missing/a: /missing: No such file or directory\n",
        ),
        ("--dir /tmp fabric true", 2, "--dir has no effect"),
    )
    nested = alone("fabric", *PROGRAM, "fabric", "true", expect=1)
    assert "vsock: not possible within another vsock fabric" in nested.stderr
    assert "vsock: the program's name is empty\n" in alone("fabric", "", expect=127).stderr
    missing = alone("fabric", "no-such-program", expect=127)
    assert "vsock: no-such-program: program not found (" in missing.stderr


#: Exits with the open standard descriptors, as bits.
OPEN = """
import fcntl, os
bits = 0
for fd in range(3):
    try: fcntl.fcntl(fd, fcntl.F_GETFD); bits |= 1 << fd
    except OSError: pass
os._exit(bits)
"""


@pytest.mark.parametrize(
    ("redirections", "left"), [("<&-", 6), (">&-", 5), ("2>&-", 3), ("<&- >&- 2>&-", 0)]
)
@pytest.mark.parametrize(
    "inner", [(), (*PROGRAM, "run", "--cid", "3", "--")], ids=["host", "guest"]
)
def test_closed_standard_descriptors_stay_closed(
    alone: Vsock, inner: tuple[str, ...], redirections: str, left: int
) -> None:
    """And no socket of vsock gets their numbers."""
    command = shlex.join([*PROGRAM, "fabric", "--", *inner, sys.executable, "-c", OPEN])
    done = subprocess.run(
        ["sh", "-c", f"{command} {redirections}"],
        env={**os.environ, **alone.environment},
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == left


def test_another_user_cannot_use_the_launcher(alone: Vsock) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    program = """if True:
        import os, sys
        import vsockets.cli.delegation, vsockets.cli.run  # nobody may be unable to read them
        os.setgroups([])
        os.setuid(65534)
        sys.argv[1:] = ["run", "id"]
        sys.exit(vsockets.cli.main())
    """
    done = alone("fabric", sys.executable, "-c", program, expect=1)
    assert "vsock fabric does not answer" in done.stderr
    assert done.stdout == ""
