"""Start and end of a supervised program: as with ``env``, and together with its supervisor."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from cli.vsock import PATIENCE, PROGRAM, Vsock
from vsockets.testing import PrivateFabric, wait_until

WAIT = "read line"


def children(pid: int) -> list[int]:
    try:
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except OSError:
        return []


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_signals_reach_the_program(vsock: Vsock, number: signal.Signals) -> None:
    script = f"trap 'echo caught; exit 5' {number.value}; echo ready; while :; do sleep 0.01; done"
    running = vsock.start("run", "sh", "-c", script)
    assert running.read_line() == "ready"
    running.process.send_signal(number)
    assert running.process.wait(PATIENCE) == 5
    assert running.finish(expect=5)[0] == b"caught\n"


def test_the_front_ends_with_the_signal_that_ended_the_program(vsock: Vsock) -> None:
    running = vsock.start("run", "sh", "-c", f"echo ready; {WAIT}")
    running.read_line()
    running.process.terminate()
    assert running.process.wait(PATIENCE) == -signal.SIGTERM


def test_a_late_signal_does_not_hide_the_exit_status(vsock: Vsock) -> None:
    """The supervisor ends with the signal unread, which the front's socket reports first."""
    running = vsock.start("run", "sh", "-c", f"echo ready; {WAIT}; exit 5")
    running.read_line()
    front = running.process
    (supervisor,) = children(front.pid)
    (program,) = children(supervisor)
    os.kill(supervisor, signal.SIGSTOP)
    assert front.stdin is not None
    front.stdin.write(b"\n")
    front.stdin.flush()
    wait_until(lambda: not is_there(program), "the program to end")
    front.send_signal(signal.SIGUSR1)
    wait_until(lambda: waits_for_something_new(front.pid), "the signal to be passed on")
    front.send_signal(signal.SIGSTOP)
    os.kill(supervisor, signal.SIGCONT)
    wait_until(lambda: not is_there(supervisor), "the supervisor to end")
    front.send_signal(signal.SIGCONT)
    assert front.wait(PATIENCE) == 5


def waits_for_something_new(pid: int) -> bool:
    """Return whether a process sleeps without pending signals."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines)
    return status["State"].startswith("S") and not int(status["ShdPnd"], 16)


def test_a_group_signal_reaches_the_program_once(vsock: Vsock, tmp_path: Path) -> None:
    program = r"""
import os, signal, sys
# The handler may run within a print(), which is not reentrant.
signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"one\n"))
print(os.getpid(), os.getpgid(0), flush=True)
for line in sys.stdin: print(line, end="", flush=True)
"""
    # The shell runs it as a job, with a process group of its own.
    with subprocess.Popen(
        [
            "bash",
            "-c",
            f"exec 3<&0; set -m; {' '.join(PROGRAM)} run "
            f"{sys.executable} -c '{program}' <&3 & wait",
        ],
        env=vsock.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin and process.stdout
        pid, group = map(int, process.stdout.readline().split())
        assert pid != group
        os.killpg(group, signal.SIGTERM)
        assert process.stdout.readline() == "one\n"
        process.stdin.write("end\n")
        process.stdin.flush()
        assert process.stdout.readline() == "end\n"
        process.stdin.close()
        assert process.stdout.read() == ""


def test_killing_the_front_kills_the_program(vsock: Vsock) -> None:
    running = vsock.start("run", "sh", "-c", f"echo $$; {WAIT}")
    pid = int(running.read_line())
    running.process.kill()
    wait_until(lambda: not is_there(pid), "the program to be killed")


def test_the_supervisor_waits_for_children_after_the_front_was_killed(vsock: Vsock) -> None:
    script = f"setsid sh -c 'echo $$; exec sleep 1000' & echo $$; {WAIT}"
    running = vsock.start("run", "sh", "-c", script)
    numbers = {int(running.read_line()), int(running.read_line())}
    (supervisor,) = children(running.process.pid)
    running.process.kill()
    wait_until(lambda: sum(map(is_there, numbers)) == 1, "the program to be killed")
    # It would never sleep if the end of the front were reported again and again.
    wait_until(lambda: state_of(supervisor) == "S", "the supervisor to sleep")
    (child,) = filter(is_there, numbers)
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: not is_there(supervisor), "the supervisor to end")


def state_of(pid: int) -> str:
    """Return a process's state, as one letter of proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_killing_the_supervisor_kills_the_program_and_its_children(vsock: Vsock) -> None:
    # One of them in a session of its own.
    script = f"setsid sh -c 'echo $$; exec sleep 1000' & echo $$; {WAIT}"
    running = vsock.start("run", "sh", "-c", script)
    pids = [int(running.read_line()), int(running.read_line())]
    (supervisor,) = children(running.process.pid)
    os.kill(supervisor, signal.SIGKILL)
    running.finish(expect=-signal.SIGKILL)
    wait_until(lambda: not any(map(is_there, pids)), "all to be killed")


def test_background_processes_are_still_supervised(vsock: Vsock) -> None:
    script = """
import socket, sys
sys.stdin.readline()
sock = socket.socket(40, socket.SOCK_STREAM)
print("still", sock.getsockname(), flush=True)
"""
    command = f"exec 3<&0; {sys.executable} -c '{script}' <&3 & exit 4"
    running = vsock.start("run", "sh", "-c", command)
    assert running.process.wait(PATIENCE) == 4
    running.write(b"\n")
    assert running.read_line() == "still (4294967295, 4294967295)"


def test_the_supervisor_holds_no_file_of_the_program(vsock: Vsock) -> None:
    # The reader sees the end of the pipe as soon as the program closes its output.
    running = vsock.start("run", "sh", "-c", f"exec >&- 2>&-; {WAIT}")
    assert running.process.stdout is not None
    ready, _, _ = select.select([running.process.stdout], [], [], PATIENCE)
    assert ready
    assert running.process.stdout.read() == b""
    assert running.process.poll() is None
    running.finish(b"\n", expect=0)


def test_socket_activation_names_the_programs_process(vsock: Vsock) -> None:
    # As with systemd, LISTEN_PID is the process that was started.
    program = "import os; print(os.environ['LISTEN_PID'] == str(os.getpid()))"
    script = f'export LISTEN_PID=$$; exec {" ".join(PROGRAM)} run {sys.executable} -c "{program}"'
    done = subprocess.run(
        ["sh", "-c", script], env=vsock.environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"


#: Creates sockets while orphans end as children of the supervisor.
ORPHANS = """
import os, socket, sys
reader, writer = os.pipe()
if os.fork() == 0:
    os.close(writer)
    os.set_blocking(reader, False)
    while True:
        try: os._exit(len(os.read(reader, 1)))
        except BlockingIOError: pass
        if (child := os.fork()) == 0:
            for _ in range(20):
                if os.fork() == 0: break
            os._exit(0)
        os.waitpid(child, 0)
numbers = {socket.socket(40, 1).fileno() for _ in range(2500)}
print(min(numbers) > 2)
"""


def test_orphans_that_end_disturb_no_call(vsock: Vsock) -> None:
    assert vsock("run", sys.executable, "-c", ORPHANS).stdout == "True\n"


class Terminal:
    """A shell with job control on a pseudo-terminal."""

    def __init__(self, vsock: Vsock) -> None:
        pid, self.fd = pty.fork()
        if pid == 0:
            os.execvpe(
                "bash",
                ["bash", "--norc", "--noprofile", "-i"],
                {**vsock.environment, "PS1": "$ ", "TERM": "dumb", "HISTFILE": ""},
            )
        self.pid = pid
        attributes = termios.tcgetattr(self.fd)
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(self.fd, termios.TCSANOW, attributes)
        self._seen = ""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def expect(self, pattern: str) -> str:
        deadline = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self._seen)):
            ready, _, _ = select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {pattern!r} in {self._seen!r}"
            self._seen += os.read(self.fd, 4096).decode(errors="replace")
        self._seen = self._seen[found.end() :]
        return found[0]

    def close(self) -> None:
        os.close(self.fd)
        os.waitpid(self.pid, 0)


@pytest.fixture
def terminal(vsock: Vsock, fabric: PrivateFabric) -> Terminal:
    return Terminal(vsock)


def test_job_control_works(terminal: Terminal) -> None:
    run = " ".join(PROGRAM) + " run"
    program = "echo go; while read line; do echo got $line; done"
    terminal.type(f"{run} sh -c '{program}'\n")
    terminal.expect(r"go\r\n")
    terminal.type("one\n")
    terminal.expect("got one")
    terminal.type("\x1a")  # ^Z
    terminal.expect("Stopped")
    terminal.type("echo in the shell: $((1+1))\n")
    terminal.expect("shell: 2")
    terminal.type("fg\n")
    terminal.expect("run sh")
    terminal.type("two\n")
    terminal.expect("got two")
    terminal.type("\x03")  # ^C
    terminal.expect(r"\$ ")
    terminal.type("echo status: $?\n")
    assert terminal.expect(r"status: \d+") == "status: 130"
    terminal.type(f"{run} stty size\n")  # the terminal is the program's
    terminal.expect(r"\d+ \d+")
    terminal.type(f"{run} sh -c 'kill -STOP $$; echo went on'\n")
    terminal.expect("Stopped")
    terminal.type("fg\n")
    terminal.expect("went on")
    terminal.type("exit\n")
    terminal.close()


def test_a_supervised_shell_has_job_control(terminal: Terminal) -> None:
    terminal.type(" ".join(PROGRAM) + " run bash --norc --noprofile -i\n")
    terminal.expect(r"\$ ")
    terminal.type("sh -c 'echo begun; exec sleep 1000'\n")
    terminal.expect(r"begun\r\n")
    terminal.type("\x1a")
    terminal.expect("Stopped")
    terminal.type('kill -KILL %1; while [ "$(jobs -s)" ]; do :; done; exit 3\n')
    terminal.type("echo status: $?\n")
    assert terminal.expect(r"status: \d+") == "status: 3"
    terminal.type("exit\n")
    terminal.close()
