"""QEMU, kernels and servers from Debian, unpacked beside the system and never installed.

Each suite has an apt configuration of its own below the cache, so apt checks signatures as it
always does and the machine's own lists stay as they are.  The mirror is the machine's.
"""

from __future__ import annotations

import fcntl
import functools
import lzma
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE = Path.home() / ".cache/vsockets/machines"

_KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"

#: How long a download may take, in seconds.
_PATIENCE = 600

_CONFIGURATION = """\
Dir "{root}";
Dir::State::status "{root}/status";
APT::Architecture "amd64";
APT::Install-Recommends "false";
APT::Sandbox::User "";
Acquire::Languages "none";
Acquire::Retries "3";
Debug::NoLocking "true";
"""


class Unavailable(Exception):
    """It could not be had; the text says why."""


def _run(*command: str, **environment: str) -> str:
    try:
        done = subprocess.run(
            command,
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


def _mirror() -> str:
    """Where this machine gets Debian from."""
    sites = _run("apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages")
    for site in sites.split():
        if "debian" in site and "security" not in site:
            return site
    raise Unavailable("apt knows no Debian mirror")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Within this context nobody else fills ``folder``."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f".{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _filled(name: str, fill: Callable[[Path], None]) -> Path:
    """The folder ``name`` of the cache, filled by ``fill`` the first time."""
    folder = CACHE / name
    with _locked(folder):
        if not folder.exists():
            new = CACHE / f"{name}.new"
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            fill(new)
            new.rename(folder)
    return folder


class Suite:
    """Packages of one suite of Debian, with those it builds on."""

    def __init__(self, *names: str) -> None:
        self._names = names
        self._root = CACHE / f"apt-{names[-1]}"

    @functools.cached_property
    def _configuration(self) -> str:
        if not Path(_KEYS).exists():
            raise Unavailable(f"no {_KEYS}: apt install debian-archive-keyring")
        lists = self._root / "var/lib/apt/lists/partial"
        archives = self._root / "var/cache/apt/archives/partial"
        for folder in (lists, archives, self._root / "etc/apt/preferences.d"):
            folder.mkdir(parents=True, exist_ok=True)
        (self._root / "status").touch()
        mirror = _mirror()
        sources = [f"deb [signed-by={_KEYS}] {mirror} {name} main\n" for name in self._names]
        (self._root / "etc/apt/sources.list").write_text("".join(sources))
        path = self._root / "apt.conf"
        path.write_text(_CONFIGURATION.format(root=self._root))
        _run("apt-get", "update", APT_CONFIG=str(path))
        return str(path)

    def with_dependencies(self, *packages: str) -> list[str]:
        """Their names, and those of everything they need."""
        command = ("apt-get", "-y", "-t", self._names[-1], "--simulate", "install", *packages)
        plan = _run(*command, APT_CONFIG=self._configuration)
        return [line.split()[1] for line in plan.splitlines() if line.startswith("Inst ")]

    def find(self, prefix: str, suffix: str) -> str:
        """The newest package so called."""
        names = _run("apt-cache", "pkgnames", prefix, APT_CONFIG=self._configuration).split()
        found = [name for name in names if name.endswith(suffix)]
        if not found:
            raise Unavailable(f"no package {prefix}*{suffix} in {self._names[-1]}")

        def version(name: str) -> list[int]:
            return [
                int(part)
                for part in name.removeprefix(prefix).split("+")[0].split("-")[0].split(".")
            ]

        return max(found, key=version)

    def unpack(self, folder: Path, *packages: str) -> None:
        """Their files, into ``folder``."""
        downloads = folder / ".downloads"
        downloads.mkdir()
        # Old files first: a mirror is asked for what is not there.
        command = ["apt-get", "-t", self._names[-1], "download", *packages]
        try:
            done = subprocess.run(
                command,
                cwd=downloads,
                env={**os.environ, "APT_CONFIG": self._configuration},
                capture_output=True,
                text=True,
                timeout=_PATIENCE,
            )
        except subprocess.TimeoutExpired as error:
            raise Unavailable(str(error)) from None
        if done.returncode:
            raise Unavailable(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
        for package in sorted(downloads.iterdir()):
            _run("dpkg-deb", "-x", str(package), str(folder))
        shutil.rmtree(downloads)


_STABLE = Suite("bookworm")
_TESTING = Suite("forky")
_BACKPORTS = Suite("trixie", "trixie-backports")


def qemu() -> list[str]:
    """The command of a QEMU that knows vfio-user (10.1 or newer), with its own libraries."""

    def fill(folder: Path) -> None:
        wanted = ("libc6", "qemu-system-x86", "qemu-system-common", "qemu-system-data")
        _BACKPORTS.unpack(folder, *_BACKPORTS.with_dependencies(*wanted))

    root = _filled("qemu", fill)
    libraries = ":".join(
        str(root / part) for part in ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu")
    )
    return [
        str(root / "usr/lib64/ld-linux-x86-64.so.2"),
        "--library-path",
        libraries,
        str(root / "usr/bin/qemu-system-x86_64"),
        "-L",
        str(root / "usr/share/qemu"),
        "-L",
        str(root / "usr/share/seabios"),
    ]


def userland() -> Path:
    """What runs in a guest: busybox and Python."""

    def fill(folder: Path) -> None:
        _STABLE.unpack(
            folder,
            *("busybox-static", "python3.11-minimal", "libpython3.11-minimal"),
            *("libpython3.11-stdlib", "libc6", "libexpat1", "zlib1g"),
        )

    return _filled("userland-python", fill)


def tls_libraries() -> dict[str, bytes]:
    """What Python's ``ssl`` needs in a guest besides, by their paths there."""

    def fill(folder: Path) -> None:
        _STABLE.unpack(folder, "libssl3")

    root = _filled("userland-tls", fill)
    return {
        f"/lib/x86_64-linux-gnu/{path.name}": path.read_bytes()
        for path in root.rglob("lib*.so.3")
    }


def rust_back_end() -> Path:
    """Where Debian's ``vhost-device-vsock`` is unpacked, with libraries of its own."""

    def fill(folder: Path) -> None:
        _TESTING.unpack(folder, *_TESTING.with_dependencies("vhost-device-vsock", "libc6"))

    return _filled("vhost-device-vsock", fill)


_ERLANG = (
    *("base", "asn1", "crypto", "eldap", "ftp", "inets", "mnesia", "os-mon", "parsetools"),
    *("public-key", "runtime-tools", "snmp", "ssl", "syntax-tools", "tftp", "tools", "xmerl"),
)

#: Debian's own has its folder written into it.
_ERL = """\
#!/bin/sh
export ROOTDIR="$(dirname "$(dirname "$(readlink -f "$0")")")/usr/lib/erlang"
export BINDIR="$(echo "$ROOTDIR"/erts-*/bin)" EMU=beam PROGNAME=erl
exec "$BINDIR/erlexec" "$@"
"""


def rabbitmq() -> str:
    """What to put in front of ``PATH`` to have Debian's RabbitMQ; it is nobody's service."""

    def fill(folder: Path) -> None:
        _STABLE.unpack(folder, "rabbitmq-server", *(f"erlang-{part}" for part in _ERLANG))
        script = folder / "bin/erl"
        script.parent.mkdir(exist_ok=True)
        script.write_text(_ERL)
        script.chmod(0o755)

    root = _filled("rabbitmq", fill)
    places = root / "bin", root / "usr/lib/rabbitmq/bin", root / "usr/bin"
    path = os.pathsep.join(map(str, places))
    # It is built for Debian 12, and finds most of its libraries in the machine.
    _run(str(places[0] / "erl"), "-noshell", "-eval", "crypto:start(), halt().")
    return path


def http2_proxy() -> tuple[list[str], list[str]]:
    """The commands of nghttpx, and of tinyproxy, which goes where it is told to."""

    def fill(folder: Path) -> None:
        libraries = ("libnghttp2-14", "libev4", "libjemalloc2", "libc-ares2")
        _STABLE.unpack(folder, "nghttp2-proxy", "tinyproxy-bin", *libraries)

    root = _filled("nghttpx", fill)
    libraries = f"LD_LIBRARY_PATH={root / 'usr/lib/x86_64-linux-gnu'}"
    nghttpx = ["env", libraries, str(root / "usr/sbin/nghttpx")]
    tinyproxy = [str(root / "usr/bin/tinyproxy"), "-d"]
    _run(*nghttpx, "--version")
    _run(*tinyproxy, "-v")
    return nghttpx, tinyproxy


class Kernel:
    """A Linux and its modules; ``name`` is ``stable`` (6.1) or ``newest``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = _filled(f"linux-{name}", self._stable if name == "stable" else self._newest)
        self.image = next(path for path in sorted(self.folder.rglob("vmlinuz*")) if path.is_file())

    @staticmethod
    def _stable(folder: Path) -> None:
        _STABLE.unpack(folder, _STABLE.find("linux-image-6.1.0-", "-cloud-amd64"))

    @staticmethod
    def _newest(folder: Path) -> None:
        modules = _BACKPORTS.find("linux-modules-", "+deb13-cloud-amd64")
        binary = modules.replace("linux-modules-", "linux-binary-")
        _BACKPORTS.unpack(folder, modules, binary)

    def module(self, name: str) -> bytes | None:
        """A module's contents; None when it is built in."""
        for path in self.folder.rglob(f"{name}.ko*"):
            data = path.read_bytes()
            return lzma.decompress(data) if path.suffix == ".xz" else data
        return None
