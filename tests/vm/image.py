"""The guest's first and only file system: a cpio archive the kernel unpacks."""

from __future__ import annotations

import stat
from pathlib import Path

import vsockets

from .downloads import Kernel, userland

HERE = Path(__file__).parent

#: What guests have of ours: the library, for those of their programs that want it.
PACKAGE = Path(vsockets.__file__).parent

#: What each device needs, in the order they are loaded; some kernels have some built in.
MODULES = {
    "vmci": ("vmw_vmci", "vsock", "vmw_vsock_vmci_transport"),
    "virtio": (
        *("virtio", "virtio_ring", "virtio_pci_modern_dev", "virtio_pci_legacy_dev"),
        *("virtio_pci", "vsock"),
        *("vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport"),
    ),
}

#: There for a test that loads them: what a guest's programs say to each other, and a network card.
LOOPBACK = ("vmw_vsock_virtio_transport_common", "vsock_loopback")
NETWORK = (*MODULES["virtio"][:5], "failover", "net_failover", "virtio_net")

_INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
for module in {modules}; do
    [ -e /modules/$module.ko ] && insmod /modules/$module.ko
done
stty -F /dev/ttyS1 raw -echo
exec /usr/bin/python3.11 -u -S /agent.py </dev/ttyS1 >/dev/ttyS1 2>/dev/console
"""

_ALIGNMENT = 4


class _Archive:
    """The "newc" format of cpio(5)."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0
        self._folders: set[Path] = set()

    def add(self, name: str, mode: int, data: bytes = b"") -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        links = 1
        fields = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        for part in (header + encoded, data):
            self._parts.append(part + bytes(-len(part) % _ALIGNMENT))

    def add_with_folders(self, name: str, mode: int, data: bytes) -> None:
        for folder in reversed(Path(name).parents[:-1]):
            if folder not in self._folders:
                self._folders.add(folder)
                self.add(str(folder), stat.S_IFDIR | 0o755)
        self.add(name, mode, data)

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return b"".join(self._parts)


def build(kernel: Kernel, device: str, extra: dict[str, bytes] | None = None) -> bytes:
    """An archive for ``kernel`` and a ``device``, with ``extra`` programs by their paths."""
    archive = _Archive()
    for folder in ("bin", "dev", "proc", "sys", "modules", "tmp"):
        archive.add(folder, stat.S_IFDIR | 0o755)
    root = userland()
    folders = {"bin", "dev", "proc", "sys", "modules", "tmp", "lib64"}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if name.startswith(("usr/share", "etc", "var", "lib/systemd")) or name in folders:
            continue
        if "gconv" in name or "/test/" in name or name.endswith((".pyc", "libc.so.6.debug")):
            continue
        if path.is_symlink():
            archive.add(name, stat.S_IFLNK | 0o777, str(path.readlink()).encode())
        elif path.is_dir():
            archive.add(name, stat.S_IFDIR | 0o755)
        else:
            archive.add(name, stat.S_IFREG | 0o755, path.read_bytes())
    archive.add("lib64", stat.S_IFDIR | 0o755)
    loader = "ld-linux-x86-64.so.2"
    archive.add(f"lib64/{loader}", stat.S_IFLNK | 0o777, f"/lib/x86_64-linux-gnu/{loader}".encode())
    modules = MODULES[device]
    for module in dict.fromkeys((*modules, *LOOPBACK, *NETWORK)):
        data = kernel.module(module)
        if data is not None:
            archive.add(f"modules/{module}.ko", stat.S_IFREG | 0o644, data)
    for path in sorted(PACKAGE.rglob("*.py")):
        name = f"usr/lib/python3.11/vsockets/{path.relative_to(PACKAGE)}"
        archive.add_with_folders(name, stat.S_IFREG | 0o644, path.read_bytes())
    for name, data in (extra or {}).items():
        archive.add(name, stat.S_IFREG | 0o755, data)
    archive.add("agent.py", stat.S_IFREG | 0o644, (HERE / "agent.py").read_bytes())
    archive.add("init", stat.S_IFREG | 0o755, _INIT.format(modules=" ".join(modules)).encode())
    return archive.finish()
