"""Kernels of a distribution: the image, and modules in the order they are loaded."""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterator
from pathlib import Path

from .apt import Suite, Unavailable, cached, run

#: The guest's driver modules for each device; their dependencies are found.
DRIVERS = {
    "vmci": ("vmw_vsock_vmci_transport",),
    "virtio": ("virtio_pci", "vmw_vsock_virtio_transport"),
}

_PARTS = re.compile(r"linux-(image|binary|modules)-\d")
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


class KernelImage:
    """The newest Linux kernel of a suite, and its modules."""

    def __init__(self, suite: Suite) -> None:
        """Download the kernel unless it is cached.  Raises Unavailable."""

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
        """Return the contents of modules, each after its dependencies, without built-in ones."""
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
