"""Run a part of the tests as an ordinary user, who has no capability and a home of his own.

The tests of a root say nothing of what an ordinary user may do.  This runs those that depend on
privileges most, with the working tree read-only: what they left in it would be an error.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from vsockets.vm.apt import CACHE

from . import namespace

#: Where what a user may do matters: sockets and ports, vsockd's clients, supervised programs.
PARTS = (
    *("tests/daemon", "tests/supervisor", "tests/cli/test_context.py"),
    *("tests/cli/test_run.py", "tests/cli/test_streams.py", "tests/containers"),
)

#: Files below PARTS whose tests have the same result for root and for any other user: vsockd's
#: decisions, limits and turns; one more language or tool in a supervised program, whose system
#: calls are the same.
OMITTED = (
    *("tests/daemon/test_datagram_epochs.py", "tests/daemon/test_deferred_work.py"),
    *("tests/daemon/test_device_link.py", "tests/daemon/test_exhaustion.py"),
    *("tests/daemon/test_limits.py", "tests/daemon/test_private_fabric.py"),
    *("tests/daemon/test_request_turns.py", "tests/supervisor/test_answers.py"),
    *("tests/supervisor/test_filter.py", "tests/supervisor/test_languages.py"),
    *("tests/supervisor/test_memory.py", "tests/supervisor/test_programs.py"),
    *("tests/supervisor/test_slow_vsockd.py", "tests/supervisor/test_sockets.py"),
    "tests/containers/test_programs.py",
)

NAME = "tester"


def main() -> int:
    """Return the exit status: 0 if the tests pass or cannot run here."""
    if namespace.is_within():
        return _within(Path(sys.argv[1]), int(sys.argv[2]))
    if os.geteuid() != 0:
        print("ordinary user: the tests have run as one")
        return 0
    if problem := namespace.problem():
        print(f"ordinary user: skipped: {problem}")
        return 0
    uid = _free_uid()
    folder = Path(tempfile.mkdtemp(prefix="vu-", dir="/tmp"))
    try:
        status = namespace.enter(__spec__.name, str(folder), str(uid), *sys.argv[1:])
        left = [str(path) for path in (folder / "home").iterdir() if path.name != ".cache"]
        running = _commands_of(uid)
    finally:
        for pid in _processes_of(uid):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder)
    for trace in left:
        print(f"ERROR: ordinary user: the tests have left {trace}")
    for pid, command in running.items():
        print(f"ERROR: ordinary user: the tests have left process {pid}: {command}")
    return 1 if left or running else status


def _free_uid() -> int:
    """Return a user id that nobody has, below 65536: containers map no others."""
    taken = {entry.pw_uid for entry in pwd.getpwall()} | {entry.gr_gid for entry in grp.getgrall()}
    first = 20_000 + os.getpid() % 40_000
    return next(uid for uid in range(first, 65_000) if uid not in taken and not _processes_of(uid))


def _processes_of(uid: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == uid:
                found.append(int(name))
        except FileNotFoundError:
            pass  # it has ended
    return found


def _commands_of(uid: int) -> dict[int, str]:
    """Return the command lines of the processes of ``uid`` that have not ended."""
    found = {}
    for pid in _processes_of(uid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            if line:  # else it waits to be reaped
                found[pid] = line.replace(b"\0", b" ").decode(errors="replace")
    return found


def _within(folder: Path, uid: int) -> int:
    """Set up the namespace and run the tests there."""
    home, runtime, stage, etc = (folder / name for name in ("home", "run", "stage", "etc"))
    for path in (home / ".cache/vsockets", runtime, stage, etc):
        path.mkdir(parents=True)
    for path in (folder, home, home / ".cache", runtime):
        os.chown(path, uid, uid)
        path.chmod(0o700 if path != folder else 0o755)
    # What takes long to make outlives the run: Go's standard library.
    cache = CACHE / "ordinary-user"
    cache.mkdir(parents=True, exist_ok=True)
    subprocess.run(["chown", "--recursive", f"{uid}:{uid}", cache], check=True)
    namespace.bind(cache, home / ".cache/vsockets")
    for name, line in (
        ("passwd", f"{NAME}:x:{uid}:{uid}::{home}:/bin/bash"),
        ("group", f"{NAME}:x:{uid}:"),
    ):
        original = Path("/etc", name)
        (etc / name).write_text(f"{original.read_text().rstrip()}\n{line}\n")
        namespace.mount("--bind", etc / name, original)
    namespace.bind(namespace.TREE, namespace.TREE, read_only=True)
    namespace.expose([namespace.TREE, Path(sys.base_prefix)], stage)
    environment = {
        "HOME": str(home),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(home / ".cache/hypothesis"),
        "LANG": os.environ.get("LANG", "C.UTF-8"),
        "LOGNAME": NAME,
        "PATH": namespace.PATH,
        "PYTEST_DEBUG_TEMPROOT": str(folder),  # unix sockets have short paths
        "PYTHONDONTWRITEBYTECODE": "1",
        "SHELL": "/bin/bash",
        "USER": NAME,
        "XDG_RUNTIME_DIR": str(runtime),
        **{name: os.environ[name] for name in ("CI",) if name in os.environ},
    }
    parts = sys.argv[3:] or PARTS
    command = [
        *("setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups"),
        *("--inh-caps=-all", "--bounding-set=-all", "--"),
        *(namespace.TREE / ".venv/bin/python", "tests/retry.py", "-p", "no:cacheprovider"),
        *("--numprocesses", namespace.WORKERS, "--dist", "loadfile", "-rf"),
        *(f"--ignore={path}" for path in OMITTED if path not in parts),
        *parts,
    ]
    print("\nordinary user: running", *parts, flush=True)
    return subprocess.run(command, cwd=namespace.TREE, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
