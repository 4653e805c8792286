"""The newcomer's walk: from the install line of README to each of its pastes, timed.

``make test-walk`` runs this as root: in new roots of Debian 12 and 13, as an ordinary user and as
root, once with SIGINT and SIGQUIT ignored (as of a job in a shell's background), and on Debian 13
in a container with Docker's default profile.  Each walk has the tracked files of this tree in a
home of its own and the machine's package index; prints seconds; and fails when a step does not
print what README promises.  ``python -m environments.walk bookworm`` takes one of them.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from vsockets.vm.apt import Unavailable, cached

from . import namespace
from .debian_root import make_root

#: What README asks for, pip's certificates, and what starts a container: the last one.
PACKAGES = ("make", "python3-venv", "gcc", "libc6-dev", "ca-certificates", "python3-click")

USER, UID = "newcomer", 1000
HOME = Path("/home", USER)
CLONE = HOME / "vsockets"


class Walk(NamedTuple):
    """A place to walk in."""

    release: str
    name: str
    is_contained: bool = False
    is_root: bool = False
    ignores_signals: bool = False  #: SIGINT and SIGQUIT


WALKS = {
    "bookworm": Walk("bookworm", "Debian 12"),
    "bookworm-root": Walk("bookworm", "Debian 12, root", is_root=True),
    "trixie": Walk("trixie", "Debian 13, SIGINT ignored", ignores_signals=True),
    "trixie-root": Walk("trixie", "Debian 13, root", is_root=True),
    "docker": Walk("trixie", "Debian 13, Docker's profile", is_contained=True),
}

#: The unmodified program of the pytest example.
AGENT = """\
#!/usr/bin/python3
import socket
with socket.socket(socket.AF_VSOCK) as agent:
    agent.connect((2, 5000))
"""


#: As the install line does for the lines after it.
_ACTIVATE = "! [ -e .venv ] || . .venv/bin/activate; "


class Step(NamedTuple):
    """A step of the walk: a shell script, and what it has to print."""

    name: str
    script: str
    expected: str


def pastes() -> list[Step]:
    """Return the steps, with README's code as it is printed."""
    readme = (namespace.TREE / "README.md").read_text()
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)

    def paste(beginning: str, language: str = "sh") -> str:
        (found,) = [str(code) for kind, code in blocks if kind == language and beginning in code]
        return found

    install = paste("make demo && ")
    test = paste("def test_my_agent", "python")
    pytest = "mkdir ~/project && cd ~/project\n"
    pytest += f"cat >test_it.py <<'EOF'\\n{test}EOF\\n".replace("\\n", "\n")
    pytest += f"cat >your_agent <<'EOF'\n{AGENT}EOF\nchmod +x your_agent\n"
    return [
        Step("install", install, "over vSockets"),
        Step("pip install pytest", "pip install --quiet pytest && pytest --version", "pytest"),
        Step("test my code, pytest", pytest + "pytest -q test_it.py", "1 passed"),
        Step("test my code, a suite", "vsock fabric -- sh -c 'vsock ls && echo green'", "green"),
        Step("leave VMware", paste("stream_server.c"), "HELLO FROM CONTEXT 3"),
        Step("a door", paste("welcome to guest 3"), "welcome to guest 3"),
    ]


def main() -> int:
    """Return the exit status: 0 if all walks succeed or none can be taken here."""
    if namespace.is_within():
        return _walk(WALKS[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3]))
    problem = namespace.problem()
    if not problem and shutil.which("mmdebstrap") is None:
        problem = "mmdebstrap is missing: apt install mmdebstrap"
    if problem:
        print(f"walk: skipped: {problem}")
        return 0
    status = 0
    for name in sys.argv[1:] or WALKS:
        try:
            root = _root(WALKS[name].release)
        except Unavailable as error:
            print(f"walk: {name}: skipped: {error}")
            continue
        with tempfile.TemporaryDirectory(prefix="walk-", dir="/tmp") as scratch:
            status |= namespace.enter(__spec__.name, name, str(root), scratch)
    return status


def _root(release: str) -> Path:
    """Return a root folder with the packages and the user, made if it is missing."""
    digest = hashlib.sha256(" ".join((release, USER, *PACKAGES)).encode()).hexdigest()[:12]

    def fill(folder: Path) -> None:
        print(f"walk: making a root folder of {release}", flush=True)
        make_root(folder, release, PACKAGES, "--mode=root", "--variant=minbase")
        with open(folder / "etc/passwd", "a") as users:
            users.write(f"{USER}:x:{UID}:{UID}::{HOME}:/bin/sh\n")
        with open(folder / "etc/group", "a") as groups:
            groups.write(f"{USER}:x:{UID}:\n")

    return cached(f"walk-{release}-{digest}", fill)


def _walk(walk: Walk, root: Path, scratch: Path) -> int:
    """Take a walk in the mount namespace."""
    there = _arrange(root, scratch, 0 if walk.is_root else UID)
    total = time.monotonic()
    ignore = "trap '' INT QUIT; " if walk.ignores_signals else ""
    for step in pastes():
        began = time.monotonic()
        done = subprocess.run(
            [*_enter(walk, there), "sh", "-c", f"{ignore}{_ACTIVATE}{step.script}"],
            env=_environment(walk),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
            check=False,
        )
        is_good = done.returncode == 0 and step.expected in done.stdout
        seconds = time.monotonic() - began
        print(
            f"{walk.name}: {step.name}: {seconds:.1f} s{'' if is_good else ': FAILED'}", flush=True
        )
        if not is_good:
            print(f"status {done.returncode}: {done.stdout[-3000:]}")
            return 1
    print(f"{walk.name}: all of it: {time.monotonic() - total:.1f} s", flush=True)
    return 0


def _arrange(root: Path, scratch: Path, uid: int) -> Path:
    """Mount a copy of the root folder, with this tree's files, of a user, in a home; return it."""
    namespace.mount("-t", "tmpfs", "tmpfs", scratch)
    there, upper, work = (scratch / name for name in ("root", "upper", "work"))
    for folder in (there, upper, work):
        folder.mkdir()
    layers = f"lowerdir={root},upperdir={upper},workdir={work}"
    namespace.mount("-t", "overlay", "overlay", "-o", layers, there)
    for name in ("proc", "sys", "dev"):
        namespace.bind(Path("/", name), there / name)
    namespace.mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", there / "tmp")
    # The machine's name servers, and what its configuration of pip names.
    shutil.copy("/etc/resolv.conf", there / "etc/resolv.conf")
    for path in _named_paths():
        target = there / path.relative_to("/")
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
            namespace.bind(path, target, read_only=True)
        elif path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    home, clone = (there / path.relative_to("/") for path in (HOME, CLONE))
    git = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.run(git, cwd=namespace.TREE, stdout=subprocess.PIPE, check=True)
    for name in listed.stdout.decode().split("\0")[:-1]:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(namespace.TREE / name, clone / name, follow_symlinks=False)
    for parent, _, files in os.walk(home):
        for name in (".", *files):
            os.chown(Path(parent, name), uid, uid, follow_symlinks=False)
    return there


def _pip_settings() -> dict[str, str]:
    """Return this machine's configuration of pip, as environment variables."""
    command = (sys.executable, "-m", "pip", "config", "list")
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", said, re.MULTILINE)
    return {f"PIP_{name.upper().replace('-', '_')}": value for name, value in found}


def _named_paths() -> list[Path]:
    """Return the files and folders in that configuration."""
    words = " ".join(_pip_settings().values()).split()
    paths = [Path(word.removeprefix("file://")) for word in words]
    return [path.parent if path.name == "simple" else path for path in paths if path.is_absolute()]


#: Makes the folder ``$1`` the root folder, and runs a program in ``$2`` there.
_ENTER = """
mount -t proc proc "$1/proc"
cd "$1"
/usr/sbin/pivot_root . .
umount --lazy .
cd "$2"
shift 2
exec "$@"
"""


def _enter(walk: Walk, there: Path) -> list[str | Path]:
    """Return the beginning of a command that runs as the walk's user in the root folder."""
    inside: list[str | Path] = ["unshare", "--mount", "--pid", "--fork", "sh", "-ec", _ENTER]
    inside += ["sh", there, CLONE]
    if walk.is_contained:
        inside += ["env", f"PYTHONPATH={CLONE}/src:{CLONE}/tests", "PYTHONDONTWRITEBYTECODE=1"]
        inside += ["python3", f"{CLONE}/tests/containers/runtime.py", "--profile=docker"]
        return [*inside, f"--user={UID}", "--network=host", "--", "env", "--unset=PYTHONPATH"]
    if walk.is_root:
        return inside
    inside += ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]
    return [*inside, "--inh-caps=-all", "--bounding-set=-all"]


def _environment(walk: Walk) -> dict[str, str]:
    proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    return {
        "HOME": "/root" if walk.is_root else str(HOME),
        "USER": "root" if walk.is_root else USER,
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        **proxies,
        **_pip_settings(),
    }


if __name__ == "__main__":
    sys.exit(main())
