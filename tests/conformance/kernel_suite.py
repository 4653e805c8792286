"""The Linux kernel's own vsock tests: ``tools/testing/vsock`` of Debian's kernel source.

Other parts of that source serve as a tree of files for tests of file systems.

apt downloads the newest ``linux-source`` of the machine's own Debian mirror once, into
``~/.cache/vsockets``; the tests are built there and are not part of this project.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vsockets.vm import apt

TABLES = Path(__file__).parents[2] / "docs/internals/conformance.md"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vsockets"

#: Results of a table; those of cases marked "unsteady" are not checked.
_RESULTS = ("pass", "fail", "unsteady", "does not apply")

#: The suite of Debian with the newest kernels for stable.
RELEASE = "trixie-backports"
#: A tree of 800 files, with executables and symbolic links.
TREE = ("fs/nfs", "scripts")
#: The parts of the source to unpack: the tree, and the tests' sources.
PARTS = (*TREE, "tools/testing/vsock", "tools/include")
#: The tests' source files; other programs in their folder need more than a C library.
SOURCES = ("vsock_test", "vsock_test_zerocopy", "timeout", "control", "util", "msg_zerocopy_common")
FLAGS = (
    *("-O2", "-I.", "-I../../include", "-idirafter", "../../include/uapi", "-D_GNU_SOURCE"),
    *("-fno-strict-overflow", "-fno-strict-aliasing", "-fno-common", "-w"),
    "-static",  # runs in guests as well
)
#: Seconds for each step: the source has 170 MB.
PATIENCE = 300


class Case(NamedTuple):
    """A row of a table in docs/internals/conformance.md."""

    id: int
    name: str
    results: Sequence[str]  #: one, or one for each client

    @property
    def result(self) -> str:
        """Return the first result."""
        return self.results[0]


def table(heading: str) -> list[Case]:
    """Return the table below a heading."""
    text = TABLES.read_text().partition(f"# {heading}\n")[2].partition("\n#")[0]
    rows = [row.split(" | ") for row in re.findall(r"^\| (\d.+?) \|$", text, re.M)]
    return [Case(int(row[0]), row[1], [cell for cell in row if cell in _RESULTS]) for row in rows]


def free_port() -> int:
    """Return a free TCP port of the loopback, for a run's control connection."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def listens(port: int) -> bool:
    """Return whether a TCP port has a listener."""
    rows = (row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)


class Unavailable(Exception):
    """The suite is not available here; the text gives the reason."""


def vsock_test() -> Path:
    """Return the program, built if necessary.  Raises Unavailable."""
    program = CACHE / "kernel" / "vsock_test-static"
    if not program.exists():
        _need("gcc")
        _build(source() / "tools" / "testing" / "vsock", program)
    return program


def source() -> Path:
    """Return the folder with parts of the source, downloaded if necessary.  Raises Unavailable."""
    folder = CACHE / "kernel" / "source"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all((folder / part).exists() for part in PARTS):
            _need("apt-get", "dpkg-deb", "tar", "xz")
            _unpack(_download(folder.parent), folder, PARTS)
    return folder


def unpack_all(folder: Path) -> None:
    """Unpack the whole source into a new folder.  Raises Unavailable."""
    _need("apt-get", "dpkg-deb", "tar", "xz")
    (CACHE / "kernel").mkdir(parents=True, exist_ok=True)
    _unpack(_download(CACHE / "kernel"), folder, ())


def _need(*programs: str) -> None:
    for needed in programs:
        if shutil.which(needed) is None:
            raise Unavailable(f"no {needed}")


def _download(folder: Path) -> Path:
    """Download the package, with package lists of its own: the machine's are not changed."""
    try:
        site = apt.Suite(apt.DEBIAN, RELEASE).mirror()
    except apt.Unavailable as error:
        raise Unavailable(str(error)) from None
    for name in ("lists/partial", "archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "sources.list").write_text(f"deb {site} {RELEASE} main\n")
    (folder / "apt.conf").write_text(
        f'Dir::Etc::SourceList "{folder}/sources.list";\nDir::Etc::SourceParts "-";\n'
        f'Dir::State::Lists "{folder}/lists";\nDir::Cache "{folder}";\n'
        'APT::Sandbox::User "";\n'
    )
    environment = {**os.environ, "APT_CONFIG": str(folder / "apt.conf")}
    _run("apt-get", "update", env=environment)
    found = _run("apt-cache", "search", "--names-only", r"^linux-source-[0-9.]+$", env=environment)
    names = sorted(re.findall(r"^linux-source-[0-9.]+", found, re.M), key=_version)
    if not names:
        raise Unavailable(f"no linux-source in {RELEASE}")
    _run("apt-get", "download", names[-1], env=environment, cwd=folder)
    return max(folder.glob(f"{names[-1]}_*.deb"), key=os.path.getmtime)


def _version(name: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", name)]


def _unpack(package: Path, folder: Path, parts: Sequence[str]) -> None:
    """Unpack the parts, or everything without any, into ``folder``."""
    new = folder.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    script = (
        'package=$0; dpkg-deb --fsys-tarfile "$package" '
        '| tar -xO --wildcards "*/linux-source-*.tar.xz" '
        '| tar -xJ --strip-components=1 --wildcards --no-wildcards-match-slash "$@"'
    )
    _run("sh", "-c", script, str(package), *(f"*/{part}" for part in parts), cwd=new)
    package.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def _build(folder: Path, program: Path) -> None:
    sources = [f"{name}.c" for name in SOURCES if (folder / f"{name}.c").exists()]
    _run("gcc", *FLAGS, "-o", str(program), *sources, "-lpthread", cwd=folder)


def _run(*command: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(
            command, env=env, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{command[0]} took more than {PATIENCE} s") from None
    if done.returncode != 0:
        raise Unavailable(f"{' '.join(command[:2])}: {done.stderr.strip()[-300:]}")
    return done.stdout
