"""Packages of Debian or Ubuntu, unpacked beside the system and never installed.

Each suite has an apt configuration of its own below the cache, so apt checks signatures and
checksums as it always does, needs no privilege, and the machine's own lists stay as they are.
The mirror is the machine's.
"""

from __future__ import annotations

import fcntl
import functools
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

CACHE = Path.home() / ".cache/vsockets/machines"

#: How long a download may take, in seconds.
_PATIENCE = 600

_CONFIGURATION = """\
Dir "{root}";
Dir::State::status "{root}/status";
APT::Architecture "amd64";
APT::Install-Recommends "false";
APT::Sandbox::User "";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
Acquire::Languages "none";
Acquire::GzipIndexes "true";
Acquire::Retries "3";
Debug::NoLocking "true";
"""


class Unavailable(Exception):
    """It could not be had; the text says why, and what to do if there is something."""


class Distribution(NamedTuple):
    """What packages are called where."""

    name: str  #: as in /etc/os-release, and in the addresses of mirrors
    keys: str  #: what its package indexes are signed with
    components: str
    kernel: str  #: the package that needs the newest kernel for virtual machines


DEBIAN = Distribution(
    "debian", "/usr/share/keyrings/debian-archive-keyring.gpg", "main", "linux-image-cloud-amd64"
)
UBUNTU = Distribution(
    *("ubuntu", "/usr/share/keyrings/ubuntu-archive-keyring.gpg", "main universe"),
    "linux-image-virtual",
)


def run(*command: str, folder: Path | None = None, **environment: str) -> str:
    """What a program prints; Unavailable when it fails."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]}: {error}") from None
    if done.returncode:
        raise Unavailable(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
    return done.stdout


@contextmanager
def _locked(name: str) -> Iterator[None]:
    """Within this context nobody else fills the folder ``name``."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def filled(name: str, fill: Callable[[Path], None]) -> Path:
    """The folder ``name`` of the cache, filled by ``fill`` the first time."""
    folder = CACHE / name
    with _locked(name):
        if not folder.exists():
            new = CACHE / f"{name}.new"
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            fill(new)
            new.rename(folder)
    return folder


class Suite:
    """Packages of one suite of a distribution, with those it builds on."""

    def __init__(self, distribution: Distribution, *names: str) -> None:
        self.distribution = distribution
        self.name = names[-1]
        self._names = names
        self._root = CACHE / f"apt-{self.name}"

    @functools.cached_property
    def _configuration(self) -> str:
        keys = self.distribution.keys
        if not Path(keys).exists():
            raise Unavailable(f"no {keys}: apt install {Path(keys).stem}")
        lists = self._root / "var/lib/apt/lists/partial"
        archives = self._root / "var/cache/apt/archives/partial"
        for part in ("preferences.d", "apt.conf.d"):
            (self._root / "etc/apt" / part).mkdir(parents=True, exist_ok=True)
        for folder in (lists, archives):
            folder.mkdir(parents=True, exist_ok=True)
        (self._root / "status").touch()
        where = f"[signed-by={keys}] {self.mirror()}"
        sources = [f"deb {where} {name} {self.distribution.components}\n" for name in self._names]
        (self._root / "etc/apt/sources.list").write_text("".join(sources))
        path = self._root / "apt.conf"
        # Of the machine's configuration one setting counts here: a mirror may be a frozen one.
        setting = run("apt-config", "dump", "Acquire::Check-Valid-Until")
        path.write_text(_CONFIGURATION.format(root=self._root) + setting)
        run("apt-get", "update", APT_CONFIG=str(path))
        return str(path)

    def mirror(self) -> str:
        """Return where this machine gets the distribution from."""
        name = self.distribution.name
        # What it would fetch: a container's apt has no lists that it could tell of.
        plan = run("apt-get", "-o", "Debug::NoLocking=true", "update", "--print-uris")
        for site in re.findall(r"'(\S+?)/dists/[^/]+/main/binary-amd64/", plan):
            if name in site and "security" not in site:
                return str(site)
        raise Unavailable(f"apt knows no mirror of {name.capitalize()} (see /etc/apt/sources.list)")

    def with_dependencies(self, *packages: str) -> list[str]:
        """Their names, and those of everything they need."""
        command = ("apt-get", "-y", "-t", self.name, "--simulate", "install", *packages)
        plan = run(*command, APT_CONFIG=self._configuration)
        return [line.split()[1] for line in plan.splitlines() if line.startswith("Inst ")]

    def unpack(self, folder: Path, *packages: str) -> None:
        """Their files, into ``folder``."""
        downloads = folder / ".downloads"
        downloads.mkdir()
        command = ("apt-get", "-t", self.name, "download", *packages)
        run(*command, folder=downloads, APT_CONFIG=self._configuration)
        for package in sorted(downloads.iterdir()):
            run("dpkg-deb", "-x", str(package), str(folder))
        shutil.rmtree(downloads)


def own_suite() -> Suite:
    """Of the distribution that this machine has."""
    here = platform.freedesktop_os_release()
    name, suite = here.get("ID", ""), here.get("VERSION_CODENAME", "")
    for distribution in (DEBIAN, UBUNTU):
        if name == distribution.name and suite:
            return Suite(distribution, suite)
    raise Unavailable(f"this machine has {name or 'something'} {suite}, expected Debian or Ubuntu")
