"""Build the Debian package; install, use, upgrade and purge it on Debian 12 and 13.

``make debian-package`` runs this; the package is in ``dist/`` afterwards if all has passed.  Root
folders with the build tools and with the package's dependencies are made once by mmdebstrap, below
``~/.cache/vsockets``, from this machine's mirror.  Each test uses a copy (an overlay), and no
network.  No systemd runs there; ``make test-systemd`` has one.

``python -m environments.debian_package build FOLDER`` builds the package and the one of the upgrade
into the folder.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from vsockets.vm.apt import Unavailable, cached

from . import namespace
from .debian_root import make_root

#: Of the oldest release whose hatchling reads this project's pyproject.toml.
BUILD_RELEASE = "trixie"
BUILD_PACKAGES = (
    *("debhelper", "dh-python", "pybuild-plugin-pyproject", "python3-all", "python3-hatchling"),
    *("python3-click", "python3-h11", "python3-rich"),
)

RELEASES = {"bookworm": "Debian 12", "trixie": "Debian 13"}
#: What apt would download for the package.
DEPENDENCIES = (
    *("python3", "python3-click", "python3-h11", "python3-rich"),
    *("adduser", "init-system-helpers"),
)

#: The version of the package, and that of the upgrade.
FIRST = re.findall(r"\((.*)\)", (namespace.TREE / "packaging/debian/changelog").read_text())[0]
NEXT = f"{FIRST}+next"

#: Runs in a release's root folder, with the two packages in /packages.
USE = f"""
files() {{ find / -xdev -not -path '/proc/*' -not -path '/packages*' | sort; }}
files > /tmp/before
dpkg --install /packages/vsockets_{FIRST}_all.deb
vsock --version
vsockd --help > /dev/null
getent group vsock
test -L /etc/systemd/system/multi-user.target.wants/vsockd.service
test -e /usr/share/man/man8/vsockd.8.gz
test -e /usr/share/man/man1/vsock-run.1.gz
bash -n /usr/share/bash-completion/completions/vsock
COMP_WORDS='vsock doc' COMP_CWORD=1 _VSOCK_COMPLETE=bash_complete vsock | grep -q doctor
python3 -c 'import vsockets'
vsock demo
mkdir /run/vsock-check
VSOCKETS_DIR=/run/vsock-check vsock run -- python3 -c '
import socket
with socket.socket(socket.AF_VSOCK) as listener:
    listener.bind((0xFFFFFFFF, 5000))
    listener.listen()
    with socket.socket(socket.AF_VSOCK) as client:
        client.connect((1, 5000))
        listener.accept()[0].send(b"supervised")
        print(client.recv(100).decode())
'
vsock --dir /run/vsock-check down
rm -r /run/vsock-check
echo '# changed here' >> /etc/vsock/vsock.toml
dpkg --force-confold --install /packages/vsockets_{NEXT}_all.deb
test "$(dpkg-query --show --showformat '${{Version}}' vsockets)" = {NEXT}
grep -q '# changed here' /etc/vsock/vsock.toml
dpkg --remove vsockets
test -e /etc/vsock/vsock.toml
dpkg --purge vsockets
files > /tmp/after
! getent group vsock
echo 'left after the purge:'
comm -13 /tmp/before /tmp/after | grep -v -x -f /packages/may-stay || true
test -z "$(comm -13 /tmp/before /tmp/after | grep -v -x -f /packages/may-stay)"
"""

#: Of dpkg, adduser, Python and this check itself.
MAY_STAY = r"""/tmp/.*
/run/adduser
/var/lib/dpkg/.*
/var/cache/.*
/var/log/.*
/etc/\(group\|gshadow\|passwd\|shadow\|subuid\|subgid\)-
/usr/lib/python3.*/__pycache__.*
/root/.*
"""


def main() -> int:
    """Return the exit status: 0 if all releases pass or none can be tested here."""
    if namespace.is_within():
        return _within(Path(sys.argv[1]), *map(Path, sys.argv[2:]))
    problem = namespace.problem()
    if not problem and shutil.which("mmdebstrap") is None:
        problem = "mmdebstrap is missing: apt install mmdebstrap"
    if problem:
        print(f"Debian package: skipped: {problem}")
        return 0
    with tempfile.TemporaryDirectory(prefix="deb-", dir="/tmp") as scratch:
        return namespace.enter(__spec__.name, scratch, *sys.argv[2:])


def _root(release: str, packages: Sequence[str]) -> Path:
    """Return a root folder with these packages, made if it is missing.  Raises Unavailable."""
    digest = hashlib.sha256(" ".join((release, *packages)).encode()).hexdigest()[:12]

    def fill(folder: Path) -> None:
        print(f"Debian package: making a root folder of {release}", flush=True)
        make_root(folder, release, packages, "--mode=root", "--variant=minbase")

    return cached(f"debian-package-{release}-{digest}", fill)


def _copy(root: Path, scratch: Path) -> Path:
    """Mount a copy of a root folder, whose changes are kept in ``scratch``; return its path."""
    upper, work, merged = (scratch / name for name in ("upper", "work", "merged"))
    for folder in (upper, work, merged):
        folder.mkdir(parents=True)
    namespace.mount(
        *("-t", "overlay", "overlay", "-o"),
        f"lowerdir={root},upperdir={upper},workdir={work}",
        merged,
    )
    for name in ("proc", "dev"):
        namespace.bind(Path("/", name), merged / name)
    return merged


def _in(root: Path, script: str, log: Path) -> int:
    """Run a shell script in a root folder; return its exit status, with its output in ``log``."""
    with log.open("wb") as output:
        return subprocess.run(
            ["chroot", root, "bash", "-exc", script],
            env={
                "PATH": namespace.PATH,
                "HOME": "/root",
                "LC_ALL": "C.UTF-8",
                "DEBIAN_FRONTEND": "noninteractive",
                "VSOCKETS_TRANSPORT": "fabric",
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=600,
            check=False,
        ).returncode


def _within(scratch: Path, built: Path | None = None) -> int:
    """Build in the namespace, into the folder ``built``; without it also test."""
    packages = scratch / "packages"
    packages.mkdir()
    (packages / "may-stay").write_text(MAY_STAY)
    try:
        status = _build(scratch, packages)
        if built is not None:
            for package in packages.glob("*.deb"):
                shutil.copy(package, built)
            return status
        for release, name in RELEASES.items():
            if not status:
                status = _use(release, name, scratch, packages)
    except Unavailable as error:
        print(f"Debian package: skipped: {error}")
        return 0
    if not status:
        dist = namespace.TREE / "dist"
        dist.mkdir(exist_ok=True)
        shutil.copy(packages / f"vsockets_{FIRST}_all.deb", dist)
    return status


def _build(scratch: Path, packages: Path) -> int:
    began = time.monotonic()
    root = _copy(_root(BUILD_RELEASE, BUILD_PACKAGES), scratch / "build")
    tree = root / "build" / "vsockets"
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z"],
        cwd=namespace.TREE,
        stdout=subprocess.PIPE,
        check=True,
    )
    for name in listed.stdout.decode().split("\0")[:-1]:
        if (source := namespace.TREE / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, tree / name, follow_symlinks=False)
    shutil.copytree(tree / "packaging" / "debian", tree / "debian")
    for version in (FIRST, NEXT):
        changelog = tree / "debian" / "changelog"
        changelog.write_text(changelog.read_text().replace(f"({FIRST})", f"({version})"))
        script = "cd /build/vsockets; dpkg-buildpackage --build=binary -us -uc -d"
        if status := _in(root, script, log := scratch / "build.log"):
            print(log.read_text()[-5000:])
            return status
    for package in (root / "build").glob("*.deb"):
        shutil.copy(package, packages)
    built = sorted(packages.glob("*.deb"))
    print(f"built in {time.monotonic() - began:.0f} s:", *(path.name for path in built), flush=True)
    return 0


def _use(release: str, name: str, scratch: Path, packages: Path) -> int:
    root = _copy(_root(release, DEPENDENCIES), scratch / release)
    (root / "packages").mkdir()
    namespace.bind(packages, root / "packages", read_only=True)
    began = time.monotonic()
    status = _in(root, USE, log := scratch / f"{release}.log")
    if status:
        print(log.read_text()[-5000:])
    result = "failed" if status else "installed, used, upgraded and purged"
    print(f"{name}: {result} in {time.monotonic() - began:.0f} s", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
