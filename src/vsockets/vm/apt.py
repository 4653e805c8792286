"""Packages of Debian or Ubuntu, unpacked beside the system without being installed.

Each suite has its own apt configuration below the cache: apt checks signatures and checksums as
always, needs no privilege, and leaves the machine's package lists unchanged.  The mirror is the
machine's.
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

from ..model.home import home_folder

CACHE = home_folder() / ".cache/vsockets/machines"

#: Timeout of a download in seconds.
_DOWNLOAD_SECONDS = 600

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
    """A package or file could not be obtained; the message says why and what to install."""


class Distribution(NamedTuple):
    """A distribution's names of its mirrors, keyring and kernel package."""

    name: str  #: as in /etc/os-release, and in the addresses of mirrors
    keys: str  #: the keyring that verifies its package indexes
    components: str
    kernel: str  #: the package that depends on the newest kernel for virtual machines


DEBIAN = Distribution(
    "debian", "/usr/share/keyrings/debian-archive-keyring.gpg", "main", "linux-image-cloud-amd64"
)
UBUNTU = Distribution(
    *("ubuntu", "/usr/share/keyrings/ubuntu-archive-keyring.gpg", "main universe"),
    "linux-image-virtual",
)


def run(*command: str, folder: Path | None = None, **environment: str) -> str:
    """Run a program and return its output.

    Raises Unavailable if it fails.
    """
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_DOWNLOAD_SECONDS,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]}: {error}") from None
    if done.returncode:
        raise Unavailable(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
    return done.stdout


@contextmanager
def _locked(name: str) -> Iterator[None]:
    """Hold the lock on the cached directory ``name`` during the with block."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cached(name: str, fill: Callable[[Path], None]) -> Path:
    """Return the cached directory ``name``; a missing one is created, and filled by ``fill``."""
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
    """The packages of a suite and of the suites it builds on."""

    def __init__(self, distribution: Distribution, *names: str) -> None:
        self.distribution = distribution
        self.name = names[-1]
        self._names = names
        self._root = CACHE / f"apt-{self.name}"

    @functools.cached_property
    def _configuration(self) -> str:
        keys = self.distribution.keys
        if not Path(keys).exists():
            raise Unavailable(f"keyring {keys} not found: apt install {Path(keys).stem}")
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
        # One setting of the machine's configuration applies: its mirror may be a frozen snapshot.
        setting = run("apt-config", "dump", "Acquire::Check-Valid-Until")
        path.write_text(_CONFIGURATION.format(root=self._root) + setting)
        run("apt-get", "update", APT_CONFIG=str(path))
        return str(path)

    def mirror(self) -> str:
        """Return the machine's mirror of the distribution.

        Raises Unavailable if apt knows none.
        """
        name = self.distribution.name
        # From the URIs that an update would fetch: in a container, apt has no lists.
        plan = run("apt-get", "-o", "Debug::NoLocking=true", "update", "--print-uris")
        for site in re.findall(r"'(\S+?)/dists/[^/]+/main/binary-amd64/", plan):
            if name in site and "security" not in site:
                return str(site)
        raise Unavailable(f"apt has no mirror of {name.capitalize()} (see /etc/apt/sources.list)")

    def with_dependencies(self, *packages: str) -> list[str]:
        """Return the names of packages and of all their dependencies.

        Raises Unavailable if apt fails.
        """
        command = ("apt-get", "-y", "-t", self.name, "--simulate", "install", *packages)
        plan = run(*command, APT_CONFIG=self._configuration)
        return [line.split()[1] for line in plan.splitlines() if line.startswith("Inst ")]

    def unpack(self, folder: Path, *packages: str) -> None:
        """Download packages and unpack their files into ``folder``.

        Raises Unavailable if that fails.
        """
        downloads = folder / ".downloads"
        downloads.mkdir()
        command = ("apt-get", "-t", self.name, "download", *packages)
        run(*command, folder=downloads, APT_CONFIG=self._configuration)
        for package in sorted(downloads.iterdir()):
            run("dpkg-deb", "-x", str(package), str(folder))
        shutil.rmtree(downloads)


def system_suite() -> Suite:
    """Return the suite of this machine's distribution.

    Raises Unavailable if the distribution is not supported.
    """
    here = platform.freedesktop_os_release()
    name, suite = here.get("ID", ""), here.get("VERSION_CODENAME", "")
    for distribution in (DEBIAN, UBUNTU):
        if name == distribution.name and suite:
            return Suite(distribution, suite)
    found = f"{name or 'unknown'} {suite}"
    raise Unavailable(f"unsupported system: {found} (expected Debian or Ubuntu)")
