"""The files a guest boots: a distribution's kernel, and a cpio archive as its only file system."""

from __future__ import annotations

import lzma
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from .apt import Suite, Unavailable, cached, run

#: The guest's driver modules for each device, without the modules that they depend on.
DRIVERS = {
    "vmci": ("vmw_vsock_vmci_transport",),
    "virtio": ("virtio_pci", "vmw_vsock_virtio_transport"),
}

_PARTS = re.compile(r"linux-(image|binary|modules)-\d")
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


class KernelImage:
    """The newest Linux kernel of a suite, and its modules."""

    def __init__(self, suite: Suite) -> None:
        """Download the kernel unless it is cached.

        Raises Unavailable if it cannot be downloaded.
        """

        def fill(folder: Path) -> None:
            needed = suite.with_dependencies(suite.distribution.kernel)
            suite.unpack(folder, *filter(_PARTS.match, needed))

        self.name = suite.name
        self.folder = cached(f"linux-{suite.name}", fill)
        images = [path for path in sorted(self.folder.rglob("vmlinuz*")) if path.is_file()]
        if not images:
            raise Unavailable(f"{suite.distribution.kernel} of {suite.name} has no kernel in it")
        self.image = images[0]

    def modules(self, *names: str) -> dict[str, bytes]:
        """Return the contents of modules by name, each after those it depends on.

        Modules that are built into the kernel are left out.
        """
        found: dict[str, bytes] = {}
        for name in names:
            for needed, data in self._with_dependencies(name):
                found.setdefault(needed, data)
        return found

    def _with_dependencies(self, name: str) -> Iterator[tuple[str, bytes]]:
        data = self._read(name)
        if data is None:
            return
        depends = _DEPENDS.search(data)
        for needed in depends[1].decode().split(",") if depends else ():
            yield from self._with_dependencies(needed)
        yield name, data

    def _read(self, name: str) -> bytes | None:
        # In the names of module files, "-" and "_" are equivalent.
        for path in self.folder.rglob(f"{name.replace('_', '[-_]')}.ko*"):
            if path.suffix == ".xz":
                return lzma.decompress(path.read_bytes())
            if path.suffix == ".zst":
                plain = path.with_suffix("")
                run("zstd", "-q", "-f", "-d", str(path), "-o", str(plain))
                return plain.read_bytes()
            return path.read_bytes()
        return None


#: This package, which is the guest's software.
PACKAGE = Path(__file__).parents[1]

#: Kernel parameters: the console, a reset on panic, and settings that make emulation faster.
COMMAND_LINE = (
    "console=ttyS0 quiet panic=-1 reboot=t tsc=reliable no_timer_check mitigations=off "
    "random.trust_cpu=on"
)

#: The oldest Python 3 that this package supports, in the guest as on the host.
_OLDEST_PYTHON = 11

_FOLDERS = ("dev", "proc", "sys", "modules", "tmp")

#: Directories that are below /usr in the guest, wherever its packages have them: Debian 13 has them
#: there, Debian 12 has some files here and some there.
_MERGED = ("bin", "sbin", "lib", "lib64")

#: The dynamic loader: the path that programs contain, and the directory it is in.
_LOADER = "usr/lib64/ld-linux-x86-64.so.2"
_LIBRARIES = "usr/lib/x86_64-linux-gnu"

#: Parts of packages that no guest here needs; and the loader's link, which is created here.
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


def guest_path(name: str) -> str:
    """Return the path in the guest of a package's file ``name``, without a leading slash."""
    name = name.removeprefix("/")
    return f"usr/{name}" if name.partition("/")[0] in _MERGED else name


class Archive:
    """A cpio(5) archive in the "newc" format."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0
        self._folders: set[Path] = set()

    def add(self, name: str, mode: int, data: bytes = b"") -> None:
        """Add a file, a directory or a symbolic link to ``data``, according to ``mode``."""
        self._inode += 1
        encoded = name.encode() + b"\0"
        links = 1
        fields = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        for part in (header + encoded, data):
            self._parts.append(part + bytes(-len(part) % _ALIGNMENT))

    def add_with_folders(self, name: str, mode: int, data: bytes) -> None:
        """Add a file or a link at its :func:`guest_path`, and its parent directories."""
        name = guest_path(name)
        for folder in reversed(Path(name).parents[:-1]):
            if folder not in self._folders:
                self._folders.add(folder)
                self.add(str(folder), stat.S_IFDIR | 0o755)
        self.add(name, mode, data)

    def finish(self) -> bytes:
        """Return the complete archive as bytes."""
        self.add("TRAILER!!!", 0)
        return b"".join(self._parts)


class Userland:
    """The programs of a guest: busybox and Python of a suite."""

    def __init__(self, suite: Suite) -> None:
        """Download the packages unless they are cached.

        Raises Unavailable if they cannot be downloaded.
        """

        def fill(folder: Path) -> None:
            needed = suite.with_dependencies("python3-minimal")
            minimal = [name for name in needed if name.startswith(("python3.", "libpython3."))]
            library = [name.replace("-minimal", "-stdlib") for name in minimal]
            # glibc loads libgcc_s when a thread exits, and aborts the program if it is missing.
            libraries = ("libc6", "libgcc-s1", "libexpat1", "zlib1g")
            wanted = dict.fromkeys([*minimal, *filter(lambda n: n.startswith("lib"), library)])
            suite.unpack(folder, "busybox-static", *wanted, *libraries)

        self.root = cached(f"userland-gcc-{suite.name}", fill)
        found = [path.name for path in self.root.glob("usr/bin/python3.*")]
        if not found or int(found[0].removeprefix("python3.")) < _OLDEST_PYTHON:
            version = found[0] if found else "no Python"
            raise Unavailable(f"{suite.name} has {version}, expected 3.{_OLDEST_PYTHON} or newer")
        self.python = f"/usr/bin/{found[0]}"
        self.modules = f"usr/lib/{found[0]}"  #: Python's module directory

    def add_to(self, archive: Archive) -> None:
        """Add busybox, Python and their libraries to ``archive``."""
        for path in sorted(self.root.rglob("*")):
            name = guest_path(str(path.relative_to(self.root)))
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


def add_directories(archive: Archive) -> None:
    """Add a guest's empty directories, and links to the directories below /usr."""
    for folder in _FOLDERS:
        archive.add(folder, stat.S_IFDIR | 0o755)
    for link in _MERGED:
        archive.add(link, stat.S_IFLNK | 0o777, f"usr/{link}".encode())


def build_initramfs(
    kernel: KernelImage,
    userland: Userland,
    device: str,
    final_commands: str,
    files: Mapping[str, bytes] | None = None,
    modules: tuple[str, ...] = (),
) -> bytes:
    """Return an archive for a guest with ``kernel`` and ``device``.

    ``final_commands`` are the last shell commands of the first process; ``files`` are further
    executable files by path; ``modules`` are included and not loaded.

    Raises Unavailable if the kernel has no driver for ``device``.
    """
    archive = Archive()
    add_directories(archive)
    userland.add_to(archive)
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
    init = _INIT.format(modules=" ".join(loaded)) + final_commands
    archive.add("init", stat.S_IFREG | 0o755, init.encode())
    return archive.finish()
