"""Run a page's commands in namespaces of their own: ``python stage.py`` below :data:`COMMAND`.

The page's blocks come as JSON on standard input; problems go as JSON to standard output.  Within,
the network is a loopback device, /run, /srv and /tmp are empty, and the fabric is the default one,
so that commands run as they are printed.  Every process ends with the namespaces.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vsockets.control import Control

#: Enters the namespaces, as root or, with ``AS_USER``, as another user.
COMMAND = (
    *("unshare", "--mount", "--propagation", "private", "--net", "--pid", "--fork"),
    *("--kill-child=KILL", "--mount-proc"),
)
AS_USER = ("--map-root-user",)

#: Seconds that a command may take.
PATIENCE = 60.0

#: Seconds after its first output in which a command ends, unless it runs until it is stopped.
_SERVICE = 0.2

_PAGE, _PROGRAMS = Path("/tmp/page"), Path("/tmp/programs")

#: Folders and files that pages name.
_FOLDERS = ("/srv/shared", "/srv/a", "/srv/b", "/run/fc", "/tmp/page/web")
_FILES = {
    "web/web.vmx": """\
virtualHW.version = "8"
displayName = "web"
scsi0.present = "TRUE"
scsi0.virtualDev = "lsilogic"
scsi0:0.present = "TRUE"
scsi0:0.fileName = "web.vmdk"
sata0.present = "TRUE"
sata0:1.present = "TRUE"
sata0:1.deviceType = "cdrom-raw"
sata0:1.fileName = "auto detect"
ethernet0.present = "TRUE"
ethernet0.virtualDev = "vmxnet3"
usb.present = "TRUE"
uuid.bios = "56 4d 12 34 56 78 9a bc-de f0 12 34 56 78 9a bc"
vmci0.id = "77"
""",
    "web/web.vmdk": "",
    "web.qcow2": "",
}

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1

#: Exit statuses of a command that Ctrl-C or SIGTERM ended.
_STOPPED = {0, 128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM}

_SERVER = """
import socket, sys, threading
def serve(connection):
    while data := connection.recv(4096):
        connection.sendall(data)
    connection.close()
with socket.socket(socket.AF_VSOCK) as server:
    server.bind((socket.VMADDR_CID_ANY, int(sys.argv[1]) if sys.argv[1:] else 5000))
    server.listen()
    print("serving", flush=True)
    while True:
        threading.Thread(target=serve, args=server.accept()[:1], daemon=True).start()
"""
#: Connects again until the server listens: a page may start it in the background.
_AGENT = """
import signal, socket, time
signal.signal(signal.SIGINT, signal.SIG_DFL)
until = time.monotonic() + 30
while True:
    with socket.socket(socket.AF_VSOCK) as client:
        try:
            client.connect((socket.VMADDR_CID_HOST, 5000))
        except OSError:
            print("no server", flush=True)
            assert time.monotonic() < until
            time.sleep(0.05)
            continue
        client.sendall(b"hello")
        print("connected", flush=True)
        break
"""


def main() -> None:
    """Run the page."""
    order = json.load(sys.stdin)
    _prepare(Path(order["root"]), [Path(path) for path in order["keep"]])
    problems = []
    _check(["vsock", "up"])
    for block in order["blocks"]:
        _remove_guests()
        for problem in _MODES[block["mode"]](block):
            problems.append(f"line {block['line']}: {problem}")
    json.dump(problems, sys.stdout)


def _prepare(root: Path, keep: list[Path]) -> None:
    """Hide the machine's folders except for those in ``keep``, and make the page's."""
    subprocess.run(["mount", "-t", "tmpfs", "none", "/mnt"], check=True)
    hidden = [Path(name) for name in ("/tmp", "/run", "/srv") if Path(name).is_dir()]
    kept = {path for path in keep if any(path.is_relative_to(folder) for folder in hidden)}
    kept = {path for path in kept if kept.isdisjoint(path.parents)}  # not those within another
    for number, path in enumerate(kept):
        Path("/mnt", str(number)).mkdir()
        subprocess.run(["mount", "--rbind", path, f"/mnt/{number}"], check=True)
    for folder in hidden:
        subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
    for number, path in enumerate(kept):
        path.mkdir(parents=True)
        subprocess.run(["mount", "--rbind", f"/mnt/{number}", path], check=True)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(sock, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))
    for path in (_PAGE, _PROGRAMS, Path("/tmp/home"), *map(Path, _FOLDERS)):
        path.mkdir(parents=True)
    shutil.copy("/etc/passwd", "/tmp/passwd")
    with open("/tmp/passwd", "a") as users:
        users.write("\nalice:x:1001:100::/tmp/home:/bin/sh\n")
    subprocess.run(["mount", "--bind", "/tmp/passwd", "/etc/passwd"], check=True)
    for name, arguments in (
        ("vsock", ("-m", "vsockets.cli")),
        ("vsockd", ("-m", "vsockets.daemon")),
        ("python", ()),
        ("python3", ()),
        ("pytest", ("-m", "pytest", "-p", "no:cacheprovider")),
    ):
        words = " ".join([sys.executable, *arguments])
        _program(_PROGRAMS / name, f'#!/bin/sh\nexec {words} "$@"\n')
    for name in ("server", "your_server", "service"):
        _program(_PAGE / name, f"#!{sys.executable}{_SERVER}")
    for name in ("agent", "your_agent"):
        _program(_PAGE / name, f"#!{sys.executable}{_AGENT}")
    for name, text in _FILES.items():
        (_PAGE / name).write_text(text)
    (_PAGE / "examples").symlink_to(root / "examples")
    os.environ.update(
        HOME="/tmp/home",
        PATH=f"{_PROGRAMS}:{os.environ['PATH']}",
        TERM="xterm-256color",
        TMPDIR="/tmp",
        VSOCKETS_CONFIG="/tmp/configuration",
        PYTHONDONTWRITEBYTECODE="1",
    )
    for name in ("VSOCKETS_DIR", "VSOCKETS_CONTEXT", "XDG_RUNTIME_DIR", "PYTEST_ADDOPTS"):
        os.environ.pop(name, None)
    os.chdir(_PAGE)


def _program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def _check(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _remove_guests() -> None:
    with Control("/run/vsock") as control:
        for context in control.contexts():
            if context["cid"] > 2:
                control.remove_context(context["cid"])


# A function for each mode of a block; each yields what went wrong


def _script(block: dict[str, Any]) -> Iterator[str]:
    """Run the whole block by one shell, which stops at the first error."""
    with tempfile.TemporaryFile() as output:
        status = _finish(_start(block["text"], output), output)
        text = _text(output)
    if status != 0:
        yield f"exit status {status}: {text}"
    for seen in block["seen"]:
        if seen not in text:
            yield f"does not print {seen!r}: {text}"


def _background(block: dict[str, Any]) -> Iterator[str]:
    """Start the block, and leave it to run once it has printed something."""
    ours, theirs = os.pipe()
    with os.fdopen(ours, "rb", 0) as ours_file, os.fdopen(theirs, "wb", 0) as theirs_file:
        _start(block["text"], theirs_file)
        theirs_file.close()
        if not select.select([ours_file], [], [], PATIENCE)[0] or not ours_file.read(1):
            yield "prints nothing"
        os.dup(ours_file.fileno())  # stays open: its output must not fail


def _lines(block: dict[str, Any]) -> Iterator[str]:
    """Run each line on a terminal; it may end by itself, or run until Ctrl-C."""
    text = block["text"].replace("\\\n", " ")
    for line in text.splitlines():
        command = line.strip()
        if not command or command.startswith("#"):
            continue
        if not any(part in command for part in block["left_out"]):
            yield from (f"{command}: {problem}" for problem in _on_terminal(command))


def _on_terminal(command: str) -> Iterator[str]:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp("sh", ["sh", "-c", command])
    fcntl.ioctl(terminal, 0x5414, struct.pack("HHHH", 30, 100, 0, 0))  # TIOCSWINSZ
    output = b""
    started = time.monotonic()
    deadline, asked, status = started + PATIENCE, 0, None
    while status is None:
        if select.select([terminal], [], [], 0.02)[0]:
            try:
                data = os.read(terminal, 65536)
            except OSError:  # every process has closed it
                data = b""
            if data and not output and not asked:
                deadline = time.monotonic() + _SERVICE
            output += data
        ended, raw = os.waitpid(pid, os.WNOHANG)
        if ended:
            status = os.waitstatus_to_exitcode(raw)
        elif time.monotonic() > deadline:
            if not output:
                yield f"prints nothing in {PATIENCE} s"
            asked += 1
            deadline = time.monotonic() + PATIENCE / 4
            if asked == 1:
                os.write(terminal, b"\x03")
            else:
                os.kill(pid, signal.SIGTERM if asked == 2 else signal.SIGKILL)
    os.close(terminal)
    if status != 0 and not (asked and status in _STOPPED):
        yield f"exit status {status}: {output.decode(errors='replace')}"
    if b"Traceback" in output:
        yield output.decode(errors="replace")


def _console(block: dict[str, Any]) -> Iterator[str]:
    """Run each command after ``$``, and compare what it prints; … stands for any text."""
    for part in re.split(r"^\$ ", block["text"], flags=re.MULTILINE)[1:]:
        lines = part.splitlines(keepends=True)
        count = 1
        while lines[count - 1].endswith("\\\n") or (
            count < len(lines) and lines[count][:2] == "> "
        ):
            count += 1
        command = "".join(line.removeprefix("> ") for line in lines[:count])
        expected = "".join(lines[count:]).strip()
        with tempfile.TemporaryFile() as output:
            status = _finish(_start(command, output), output)
            text = _text(output).strip()
        pattern = ".*".join(re.escape(piece) for piece in expected.split("…"))
        if expected and not re.fullmatch(pattern, text, re.DOTALL):
            yield f"{command.strip()}: prints {text!r}"
        elif not expected and status != 0:
            yield f"{command.strip()}: exit status {status}: {text}"


def _python(block: dict[str, Any]) -> Iterator[str]:
    """Run a program, or tests by pytest."""
    name = f"test_{block['line']}.py"
    (_PAGE / name).write_text(block["text"])
    runner = "pytest -q" if "def test_" in block["text"] else "python"
    yield from _script({**block, "text": f"exec {runner} {name}"})


_MODES = {
    "script": _script,
    "background": _background,
    "lines": _lines,
    "console": _console,
    "python": _python,
}


def _start(text: str, output: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["sh", "-e", "-c", text],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _finish(shell: subprocess.Popen[bytes], output: IO[bytes]) -> int:
    """Return the shell's status, and end what it has left in the background."""
    try:
        return shell.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        output.write(f"\nstill runs after {PATIENCE} s\n".encode())
        return -1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()


def _text(output: IO[bytes]) -> str:
    output.seek(0)
    return output.read().decode(errors="replace")


if __name__ == "__main__":
    main()
