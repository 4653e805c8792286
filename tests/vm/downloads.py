"""What tests boot, and servers they talk to: Debian's, whatever distribution this machine has.

``python -m vm.downloads`` fetches all of it beforehand: a test has a limit that a slow mirror
could pass.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from vsockets.vm.apt import DEBIAN, Suite, Unavailable, cached, run
from vsockets.vm.guest_image import KernelImage, Userland
from vsockets.vm.qemu import unpacked as qemu

__all__ = [
    "Unavailable",
    "ctypes_library",
    "ganesha",
    "http2_proxy",
    "kernel",
    "qemu",
    "rabbitmq",
    "rust_back_end",
    "storage_client",
    "tls_libraries",
    "userland",
]

_STABLE = Suite(DEBIAN, "bookworm")
_TESTING = Suite(DEBIAN, "forky")
_SUITES = {
    "stable": _STABLE,
    "backports": Suite(DEBIAN, "bookworm", "bookworm-backports"),
    "newest": Suite(DEBIAN, "trixie", "trixie-backports"),
}


def kernel(name: str) -> KernelImage:
    """``stable`` (6.1), ``backports`` (of Debian 12: 6.12.95) or ``newest``."""
    linux = KernelImage(_SUITES[name])
    linux.name = name
    return linux


def userland(name: str = "stable") -> Userland:
    """What runs in a guest: busybox and Python, of ``stable`` (Debian 12) or ``newest`` (13)."""
    return Userland(_SUITES[name])


def rust_back_end() -> Path:
    """Where Debian's ``vhost-device-vsock`` is unpacked, with libraries of its own."""

    def fill(folder: Path) -> None:
        _TESTING.unpack(folder, *_TESTING.with_dependencies("vhost-device-vsock", "libc6"))

    return cached("vhost-device-vsock", fill)


def tls_libraries() -> dict[str, bytes]:
    """What Python's ``ssl`` needs in a guest besides, by their paths there."""

    def fill(folder: Path) -> None:
        _STABLE.unpack(folder, "libssl3")

    return _libraries(cached("userland-tls", fill))


def ctypes_library() -> dict[str, bytes]:
    """What Python's ``ctypes`` needs in a guest besides, by its path there."""

    def fill(folder: Path) -> None:
        _STABLE.unpack(folder, "libffi8")

    return _libraries(cached("userland-ffi", fill))


#: pyfuse3, and what it imports; trio, too, which is not used.
_PYFUSE = (
    *("python3-pyfuse3", "libfuse3-3", "libffi8", "python3-trio", "python3-async-generator"),
    *("python3-attr", "python3-idna", "python3-outcome", "python3-sniffio"),
    "python3-sortedcontainers",
)


def storage_client() -> dict[str, bytes]:
    """What mounting takes in a guest besides, by its paths there."""

    def fill(folder: Path) -> None:
        _STABLE.unpack(folder, *_PYFUSE)

    root = cached("userland-nfs", fill)
    paths = root.glob("usr/lib/python3/**/*.[ps][yo]")
    code = {f"/{path.relative_to(root)}": path for path in paths if "tests" not in path.parts}
    modules = {name: path.read_bytes() for name, path in code.items()}
    return {**tls_libraries(), **_libraries(root), **modules}


def _libraries(root: Path) -> dict[str, bytes]:
    """Those that are called after their version."""
    paths = root.rglob("lib*.so.?")
    return {f"/lib/x86_64-linux-gnu/{path.name}": path.read_bytes() for path in paths}


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

    root = cached("rabbitmq", fill)
    places = root / "bin", root / "usr/lib/rabbitmq/bin", root / "usr/bin"
    path = os.pathsep.join(map(str, places))
    # It is built for Debian 12, and finds most of its libraries in the machine.
    run(str(places[0] / "erl"), "-noshell", "-eval", "crypto:start(), halt().")
    return path


def ganesha() -> Path:
    """The folder Debian's nfs-ganesha is unpacked in, with the rpcbind that it wants."""

    def fill(folder: Path) -> None:
        libraries = ("libntirpc4.3", "liburcu8", "libnfsidmap1", "libwbclient0", "libtirpc3")
        _STABLE.unpack(folder, "nfs-ganesha", "nfs-ganesha-vfs", "rpcbind", "libwrap0", *libraries)

    root = cached("ganesha", fill)
    libraries = f"{root}/usr/lib/x86_64-linux-gnu:{root}/usr/lib/ganesha"
    # It is built for Debian 12, and finds most of its libraries in the machine.
    run(str(root / "usr/bin/ganesha.nfsd"), "-v", LD_LIBRARY_PATH=libraries)
    return root


def http2_proxy() -> tuple[list[str], list[str]]:
    """The commands of nghttpx, and of tinyproxy, which goes where it is told to."""

    def fill(folder: Path) -> None:
        libraries = ("libnghttp2-14", "libev4", "libjemalloc2", "libc-ares2")
        _STABLE.unpack(folder, "nghttp2-proxy", "tinyproxy-bin", *libraries)

    root = cached("nghttpx", fill)
    libraries = f"LD_LIBRARY_PATH={root / 'usr/lib/x86_64-linux-gnu'}"
    nghttpx = ["env", libraries, str(root / "usr/sbin/nghttpx")]
    tinyproxy = [str(root / "usr/bin/tinyproxy"), "-d"]
    run(*nghttpx, "--version")
    run(*tinyproxy, "-v")
    return nghttpx, tinyproxy


def left_out(name: str, error: Unavailable) -> str:
    """Return a line about what cannot be had here, which is no failure."""
    missing = re.search(r"([\w.+-]+\.so[\w.]*): cannot open shared object", str(error))
    why = f"this machine has no {missing[1]}" if missing else str(error)
    return f"{name}: not used here, and tests that need it are skipped ({why})"


def main() -> None:
    """What cannot be had is said, and left to the tests that need it."""
    everything: dict[str, Callable[[], object]] = {
        "QEMU": qemu,
        "Linux, Debian 12's": lambda: kernel("stable"),
        "Linux, Debian 12's backport": lambda: kernel("backports"),
        "Linux, the newest backport": lambda: kernel("newest"),
        "a guest's programs, Debian 12's": userland,
        "a guest's programs, Debian 13's": lambda: userland("newest"),
        "a guest's ctypes": ctypes_library,
        "a guest's pyfuse3": storage_client,
        "vhost-device-vsock": rust_back_end,
        "RabbitMQ": rabbitmq,
        "nghttpx and tinyproxy": http2_proxy,
        "nfs-ganesha": ganesha,
    }
    for name, fetch in everything.items():
        began = time.monotonic()
        try:
            fetch()
        except Unavailable as error:
            print(left_out(name, error), flush=True)
        else:
            print(f"{name}: there after {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
