"""The initrd of the test guests: the product's guest with an agent that runs Python code."""

from __future__ import annotations

import functools
import json
import py_compile
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from vsockets.vm import guest_image
from vsockets.vm.guest_image import KernelImage, Userland

from .downloads import userland

#: Modules for tests that load them: loopback between guest programs, a network card, and file
#: systems in user space.
LOOPBACK = ("vmw_vsock_virtio_transport_common", "vsock_loopback")
NETWORK = (
    *("virtio", "virtio_ring", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci"),
    *("failover", "net_failover", "virtio_net"),
)
FUSE = ("fuse",)

_AGENT = Path(__file__).with_name("agent.py")

#: Imports what the agent and most programs of tests do; prints the files of these modules.
_IMPORTS = """
import ast, json, os, select, signal, socket, struct, subprocess, sys, time, traceback
root = os.path.dirname(os.__file__)
files = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
files = [os.path.relpath(file, root) for file in files if file.startswith(root)]
print(json.dumps([file for file in files if file.endswith(".py")]))
"""

_LAST = """\
stty -F /dev/ttyS1 raw -echo
exec {python} -u -S /agent.py </dev/ttyS1 >/dev/ttyS1 2>/dev/console
"""


def build(
    kernel: KernelImage,
    device: str,
    extra: Mapping[str, bytes] | None = None,
    world: Userland | None = None,
) -> bytes:
    """Return an initrd for ``kernel`` and ``device``, with ``extra`` programs by path.

    ``world`` is Debian 12's by default.
    """
    world = world or userland()
    files = {
        "agent.py": _AGENT.read_bytes(),
        **_bytecode(world.root, world.modules),
        **(extra or {}),
    }
    last = _LAST.format(python=world.python)
    return guest_image.build_initramfs(
        kernel, world, device, last, files, (*LOOPBACK, *NETWORK, *FUSE)
    )


@functools.cache
def _bytecode(root: Path, modules: str) -> dict[str, bytes]:
    """Return compiled modules by path: compiling is slow in emulation.

    Only a Python of the guest's version can compile for it; with another, the result is empty.
    """
    found: dict[str, bytes] = {}
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if Path(modules).name != version:
        return found
    printed = subprocess.run(
        [sys.executable, "-S", "-c", _IMPORTS], capture_output=True, check=True, text=True
    ).stdout
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder, "compiled")
        for name in json.loads(printed):
            source, path = root / modules / name, Path(modules, name)
            if source.exists():
                # Files of the guest have no time that could be compared with the source's.
                mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
                py_compile.compile(
                    str(source), str(compiled), f"/{path}", doraise=True, invalidation_mode=mode
                )
                cached = f"__pycache__/{path.stem}.{sys.implementation.cache_tag}.pyc"
                found[str(path.parent / cached)] = compiled.read_bytes()
    return found
