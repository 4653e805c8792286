"""Run a core suite on arm64: an emulated machine with Debian 13's kernel and packages.

``make test-arm64`` runs this, and ``python -m environments.arm64 PATH...`` runs other tests.  The
machine's only file system is an archive in its memory: packages that mmdebstrap has unpacked, and
the working tree.  QEMU emulates the processor in software, ten to twenty times slower than this
machine's.
"""

from __future__ import annotations

import hashlib
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vsockets.vm.apt import DEBIAN, Suite, Unavailable, cached
from vsockets.vm.guest_image import Archive

from . import namespace
from .debian_root import make_root

RELEASE = "trixie"

#: All that depends on the processor (system call numbers, structures, registers), and what users
#: do: streams, packets and datagrams of the library, and supervised programs, with both
#: interceptors.  Chosen to take ten minutes at most.
PARTS = (
    "tests/linux",
    *(f"tests/library/test_{name}.py" for name in ("stream", "datagram", "options")),
    *(
        f"tests/supervisor/test_{name}.py"
        for name in ("descriptors", "inherited", "life", "sockets", "stdlib", "trace_interceptor")
    ),
)
#: Tests of quantities: they exceed their timeouts in emulation.
_OMITTED_TESTS = "thousand or orphans_that_end"

#: The machine's packages, which are unpacked and never configured.
PACKAGES = (
    *("bash", "coreutils", "dash", "findutils", "grep", "iproute2", "libc6", "mount", "procps"),
    *("sed", "socat", "util-linux", "passwd", "netbase", "base-passwd"),
    *("python3", "python3-click", "python3-h11", "python3-h2", "python3-hypothesis"),
    *("python3-prometheus-client", "python3-pyte", "python3-pytest", "python3-pytest-timeout"),
    *("python3-pytest-xdist", "python3-rich"),
)
KERNEL = "linux-image-cloud-arm64"
QEMU = "qemu-system-aarch64"

#: Not needed by any test: the archive is unpacked into the machine's memory.
_OMITTED = ("usr/share/doc", "usr/share/locale", "usr/share/man", "usr/share/info", "var/lib/dpkg")

_INIT = """\
#!/bin/sh
export PATH=/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin HOME=/root LANG=C.UTF-8
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm /run /tmp
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
chmod 1777 /tmp /dev/shm
ip link set lo up
echo arm64 > /proc/sys/kernel/hostname
echo 1 > /proc/sys/kernel/sysrq
export PYTHONPATH=/vsockets/src VSOCKETS_TRANSPORT=fabric
export NO_COLOR=1 PYTHON_COLORS=0 PYTEST_PLUGINS=vsockets.testing.plugin
export HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis
cd /vsockets
uname -a
python3 --version
# Compiled once here, instead of by each of thousands of processes.
python3 -m compileall -q -j 2 /vsockets/src /vsockets/tests /usr/lib/python3/dist-packages/_pytest
python3 -c 'import pytest, hypothesis, vsockets.daemon.vsockd, vsockets.cli.app, vsockets.cli.run'
{command}
echo "status: $?"
sync
echo o > /proc/sysrq-trigger
sleep 60
"""

_QEMU_START = """\
#!/bin/sh
root=$(dirname "$0")
exec "$root/usr/lib64/ld-linux-x86-64.so.2" \\
    --library-path "$root/usr/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu" \\
    "$root/usr/bin/{program}" -L "$root/usr/share/qemu" "$@"
"""

#: The machine: two processors, each emulated by a thread.  Pointer authentication is costly to
#: emulate as specified, and QEMU's own algorithm does for tests.
_MACHINE = (
    *("-machine", "virt", "-accel", "tcg,thread=multi", "-cpu", "max,pauth-impdef=on"),
    *("-smp", "2", "-m", "2G", "-nodefaults", "-no-user-config", "-display", "none"),
    *("-serial", "stdio", "-no-reboot"),
)


def main() -> int:
    """Return the exit status: 0 if the tests pass or cannot run here."""
    try:
        return _run(sys.argv[1:] or list(PARTS))
    except Unavailable as error:
        print(f"arm64: skipped: {error}")
        return 0


def _run(parts: list[str]) -> int:
    qemu, kernel, root = _qemu(), _kernel(), _root()
    began = time.monotonic()
    options = "-p no:cacheprovider -rf --timeout 600 -n 2 --dist loadfile"
    options += f" -k 'not ({_OMITTED_TESTS})'"
    pytest = f"python3 -m pytest {options} {' '.join(parts)}"
    with tempfile.TemporaryDirectory(prefix="arm64-", dir="/tmp") as folder:
        archive = Path(folder, "initramfs")
        archive.write_bytes(_archive(root, _INIT.format(command=pytest)))
        print("arm64: running", *parts, flush=True)
        command = [
            *(str(qemu), *_MACHINE, "-kernel", str(kernel), "-initrd", str(archive)),
            *("-append", "console=ttyAMA0 quiet panic=-1 rdinit=/init"),
        ]
        status = 1
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace"
        ) as machine:
            assert machine.stdout is not None
            for line in machine.stdout:
                print(line.rstrip(), flush=True)
                if line.startswith("status: "):
                    status = int(line.split()[1])
    print(f"arm64: status {status} after {time.monotonic() - began:.0f} s", flush=True)
    return status


def _qemu() -> Path:
    suite = Suite(DEBIAN, RELEASE)

    def fill(folder: Path) -> None:
        print("arm64: unpacking QEMU", flush=True)
        suite.unpack(folder, *suite.with_dependencies("qemu-system-arm", "libc6"))
        program = folder / QEMU
        program.write_text(_QEMU_START.format(program=QEMU))
        program.chmod(0o755)

    return cached(f"qemu-arm-{RELEASE}", fill) / QEMU


def _kernel() -> Path:
    root = _unpacked("kernel", (KERNEL,))
    return next((root / "boot").glob("vmlinuz-*"))


def _root() -> Path:
    return _unpacked("root", PACKAGES)


def _unpacked(name: str, packages: tuple[str, ...]) -> Path:
    """Return a folder with the files of arm64 packages and of their dependencies."""
    digest = hashlib.sha256(" ".join(packages).encode()).hexdigest()[:12]

    def fill(folder: Path) -> None:
        print(f"arm64: unpacking the {name}", flush=True)
        make_root(folder, RELEASE, packages, "--variant=extract", "--architectures=arm64")

    return cached(f"arm64-{name}-{digest}", fill)


def _archive(root: Path, init: str) -> bytes:
    """Return the initramfs: the unpacked packages, the working tree and ``init``."""
    archive = Archive()
    _add_tree(archive, root, "")
    archive.add("vsockets", stat.S_IFDIR | 0o755)
    for name in ("src", "tests", "bench", "examples", "pyproject.toml", "include"):
        _add_tree(archive, namespace.TREE / name, f"vsockets/{name}")
    for name in ("proc", "sys", "dev", "run", "tmp", "root"):
        if not (root / name).exists():
            archive.add(name, stat.S_IFDIR | 0o755)
    users = (root / "usr/share/base-passwd/passwd.master").read_bytes()
    archive.add("etc/passwd", stat.S_IFREG | 0o644, users.replace(b":*:", b":x:"))
    groups = (root / "usr/share/base-passwd/group.master").read_bytes()
    archive.add("etc/group", stat.S_IFREG | 0o644, groups.replace(b":*:", b":x:"))
    archive.add("init", stat.S_IFREG | 0o755, init.encode())
    return archive.finish()


def _add_tree(archive: Archive, path: Path, name: str) -> None:
    """Add a file, link or folder with its contents to ``archive``, as ``name``."""
    if name in _OMITTED or path.name == "__pycache__":
        return
    mode = path.lstat().st_mode
    if name:
        if stat.S_ISLNK(mode):
            archive.add(name, mode, str(path.readlink()).encode())
        elif stat.S_ISREG(mode):
            archive.add(name, mode, path.read_bytes())
        elif stat.S_ISDIR(mode):
            archive.add(name, mode)
    if stat.S_ISDIR(mode):
        for entry in sorted(path.iterdir()):
            _add_tree(archive, entry, f"{name}/{entry.name}" if name else entry.name)


if __name__ == "__main__":
    sys.exit(main())
