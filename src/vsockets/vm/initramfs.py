"""A guest's first and only file system: a cpio archive that its kernel unpacks."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

from .apt import Suite, Unavailable, filled
from .kernels import DRIVERS, KernelImage

#: The library's own files: the guest's tools.
PACKAGE = Path(__file__).parents[1]

#: What its kernel is told: where the console is, to reset on a panic, and what makes it quick
#: under emulation.
COMMAND_LINE = (
    "console=ttyS0 quiet panic=-1 reboot=t tsc=reliable no_timer_check mitigations=off "
    "random.trust_cpu=on"
)

#: This package needs 3.11, in the guest as here.
_OLDEST_PYTHON = 11

_FOLDERS = ("dev", "proc", "sys", "modules", "tmp")

#: Folders of packages that are below /usr in a guest, wherever its distribution has them: Debian
#: 13 has them there, 12 has some here and some there.
_MERGED = ("bin", "sbin", "lib", "lib64")

#: The loader: where programs say it is, and where it is.
_LOADER = "usr/lib64/ld-linux-x86-64.so.2"
_LIBRARIES = "usr/lib/x86_64-linux-gnu"

#: Parts of packages that no guest here misses; and the loader's link, which is made here.
_NOT_NEEDED = ("usr/share", "etc", "var", "usr/lib/systemd", "usr/lib64")

_INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin HOME=/tmp
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
mkdir -p /dev/pts
mount -t devpts none /dev/pts
for module in {modules}; do insmod /modules/$module.ko; done
"""

_ALIGNMENT = 4


def place(name: str) -> str:
    """Return where a file called ``name`` in its package is in a guest, without a first slash."""
    name = name.removeprefix("/")
    return f"usr/{name}" if name.partition("/")[0] in _MERGED else name


class Archive:
    """The "newc" format of cpio(5)."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0
        self._folders: set[Path] = set()

    def add(self, name: str, mode: int, data: bytes = b"") -> None:
        """A file, a folder, or a symbolic link (``data`` is where to), by its ``mode``."""
        self._inode += 1
        encoded = name.encode() + b"\0"
        links = 1
        fields = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        for part in (header + encoded, data):
            self._parts.append(part + bytes(-len(part) % _ALIGNMENT))

    def add_with_folders(self, name: str, mode: int, data: bytes) -> None:
        """Add a file or a link at its :func:`place`, and the folders it is in."""
        name = place(name)
        for folder in reversed(Path(name).parents[:-1]):
            if folder not in self._folders:
                self._folders.add(folder)
                self.add(str(folder), stat.S_IFDIR | 0o755)
        self.add(name, mode, data)

    def finish(self) -> bytes:
        """The archive."""
        self.add("TRAILER!!!", 0)
        return b"".join(self._parts)


class Userland:
    """What runs in a guest: busybox and Python, a suite's."""

    def __init__(self, suite: Suite) -> None:
        """Downloads it the first time; Unavailable."""

        def fill(folder: Path) -> None:
            needed = suite.with_dependencies("python3-minimal")
            minimal = [name for name in needed if name.startswith(("python3.", "libpython3."))]
            library = [name.replace("-minimal", "-stdlib") for name in minimal]
            libraries = ("libc6", "libexpat1", "zlib1g")
            wanted = dict.fromkeys([*minimal, *filter(lambda n: n.startswith("lib"), library)])
            suite.unpack(folder, "busybox-static", *wanted, *libraries)

        self.root = filled(f"userland-{suite.name}", fill)
        found = [path.name for path in self.root.glob("usr/bin/python3.*")]
        if not found or int(found[0].removeprefix("python3.")) < _OLDEST_PYTHON:
            what = found[0] if found else "no Python"
            raise Unavailable(f"{suite.name} has {what}, expected 3.{_OLDEST_PYTHON} or newer")
        self.python = f"/usr/bin/{found[0]}"
        self.modules = f"usr/lib/{found[0]}"  #: where Python finds modules

    def put_into(self, archive: Archive) -> None:
        """Add all of it that a guest needs."""
        for path in sorted(self.root.rglob("*")):
            name = place(str(path.relative_to(self.root)))
            if name.startswith(_NOT_NEEDED) or (path.is_dir() and not path.is_symlink()):
                continue
            if "gconv" in name or "/test/" in name or name.endswith((".pyc", "libc.so.6.debug")):
                continue
            if path.is_symlink():
                target = str(path.readlink()).encode()
                archive.add_with_folders(name, stat.S_IFLNK | 0o777, target)
            else:
                archive.add_with_folders(name, stat.S_IFREG | 0o755, path.read_bytes())
        loader = f"/{_LIBRARIES}/{Path(_LOADER).name}".encode()
        archive.add_with_folders(_LOADER, stat.S_IFLNK | 0o777, loader)


def put_folders(archive: Archive) -> None:
    """Add the folders that no file brings along, and the links to those below /usr."""
    for folder in _FOLDERS:
        archive.add(folder, stat.S_IFDIR | 0o755)
    for link in _MERGED:
        archive.add(link, stat.S_IFLNK | 0o777, f"usr/{link}".encode())


def build(
    kernel: KernelImage,
    userland: Userland,
    device: str,
    last: str,
    files: Mapping[str, bytes] | None = None,
    modules: tuple[str, ...] = (),
) -> bytes:
    """An archive for ``kernel``, for a guest that has ``device``.

    ``last`` is what its first process does in the end, lines for the shell; ``files`` are further
    ones by their paths, all executable; ``modules`` are there and not loaded.
    """
    archive = Archive()
    put_folders(archive)
    userland.put_into(archive)
    loaded = kernel.modules(*DRIVERS[device])
    if DRIVERS[device][-1] not in loaded:
        raise Unavailable(f"the kernel of {kernel.name} has no {DRIVERS[device][-1]}")
    for name, data in {**kernel.modules(*modules), **loaded}.items():
        archive.add(f"modules/{name}.ko", stat.S_IFREG | 0o644, data)
    for path in sorted(PACKAGE.rglob("*.py")):
        name = f"{userland.modules}/vsockets/{path.relative_to(PACKAGE)}"
        archive.add_with_folders(name, stat.S_IFREG | 0o644, path.read_bytes())
    for name, data in (files or {}).items():
        archive.add_with_folders(name, stat.S_IFREG | 0o755, data)
    init = _INIT.format(modules=" ".join(loaded)) + last
    archive.add("init", stat.S_IFREG | 0o755, init.encode())
    return archive.finish()
