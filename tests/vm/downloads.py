"""Debian's software for guests and test servers, on any distribution.

``python -m vm.downloads`` fetches all of it in advance: on a slow mirror, a download could exceed
the timeout of a test.
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
    "git",
    "go_libraries",
    "go_rpc",
    "http2_proxy",
    "kernel",
    "minimal_modules",
    "qemu",
    "qemu_agent",
    "rabbitmq",
    "rust_back_end",
    "rust_libraries",
    "storage_client",
    "systemd_notify",
    "tls_libraries",
    "userland",
    "vmware_tools",
]

_STABLE = Suite(DEBIAN, "bookworm")
_TESTING = Suite(DEBIAN, "forky")
_SUITES = {
    "stable": _STABLE,
    "backports": Suite(DEBIAN, "bookworm", "bookworm-backports"),
    "trixie": Suite(DEBIAN, "trixie"),
    "testing": _TESTING,
    "newest": Suite(DEBIAN, "trixie", "trixie-backports"),
}


def kernel(name: str) -> KernelImage:
    """Return a kernel of Debian by the name of its suite here.

    ``stable`` (Debian 12's, 6.1), ``backports`` (Debian 12's, 6.12.95), ``trixie`` (Debian 13's),
    ``testing`` or ``newest`` (of the backports for Debian 13).
    """
    linux = KernelImage(_SUITES[name])
    linux.name = name
    return linux


def userland(name: str = "stable") -> Userland:
    """Return a guest's busybox and Python: ``stable`` (Debian 12) or ``newest`` (13)."""
    return Userland(_SUITES[name])


def minimal_modules() -> list[str]:
    """Return the paths of the modules of Debian 12's python3-minimal, in its module directory."""

    def fill(folder: Path) -> None:
        needed = _STABLE.with_dependencies("python3-minimal")
        _STABLE.unpack(folder, *(name for name in needed if name.startswith("libpython3.")))

    (modules,) = cached("python3-minimal", fill).glob("usr/lib/python3.*")
    return [str(path.relative_to(modules)) for path in modules.rglob("*") if path.is_file()]


def rust_back_end() -> Path:
    """Return the directory of Debian's ``vhost-device-vsock``, unpacked with its libraries."""

    def fill(folder: Path) -> None:
        _TESTING.unpack(folder, *_TESTING.with_dependencies("vhost-device-vsock", "libc6"))

    return cached("vhost-device-vsock", fill)


def tls_libraries() -> dict[str, bytes]:
    """Return the additional files that Python's ``ssl`` needs in a guest, by path."""

    def fill(folder: Path) -> None:
        _STABLE.unpack(folder, "libssl3")

    return _libraries(cached("userland-tls", fill))


def ctypes_library() -> dict[str, bytes]:
    """Return the additional files that Python's ``ctypes`` needs in a guest, by path."""

    def fill(folder: Path) -> None:
        _STABLE.unpack(folder, "libffi8")

    return _libraries(cached("userland-ffi", fill))


def git() -> dict[str, bytes]:
    """Return ``/git`` and the additional files that it needs in a guest, by path."""

    def fill(folder: Path) -> None:
        _STABLE.unpack(folder, "git", "libpcre2-8-0")

    root = cached("userland-git", fill)
    return {**_libraries(root), "/git": (root / "usr/bin/git").read_bytes()}


#: pyfuse3 and the modules that it imports, which include the unused trio.
_PYFUSE = (
    *("python3-pyfuse3", "libfuse3-3", "libffi8", "python3-trio", "python3-async-generator"),
    *("python3-attr", "python3-idna", "python3-outcome", "python3-sniffio"),
    "python3-sortedcontainers",
)


def storage_client() -> dict[str, bytes]:
    """Return the additional files that an NFS client needs in a guest, by path."""

    def fill(folder: Path) -> None:
        _STABLE.unpack(folder, *_PYFUSE)

    root = cached("userland-nfs", fill)
    paths = root.glob("usr/lib/python3/**/*.[ps][yo]")
    code = {f"/{path.relative_to(root)}": path for path in paths if "tests" not in path.parts}
    modules = {name: path.read_bytes() for name, path in code.items()}
    return {**tls_libraries(), **_libraries(root), **modules}


def _libraries(root: Path) -> dict[str, bytes]:
    """Return the libraries below ``root`` whose names end with their version."""
    paths = root.rglob("lib*.so.?")
    return {f"/lib/x86_64-linux-gnu/{path.name}": path.read_bytes() for path in paths}


#: VMware Tools with the libraries that they load, but for the service of guest operations.
_TOOLS = (
    *("open-vm-tools", "libffi8", "libpcre2-8-0", "libgssapi-krb5-2", "libkrb5-3", "libcom-err2"),
    *("libk5crypto3", "libkrb5support0", "libkeyutils1", "libudev1", "libdrm2"),
    *("zlib1g", "libselinux1", "libmount1", "libblkid1", "libgcc-s1", "libstdc++6"),
)
#: Those whose names differ between Debian 12 and 13, which has 64-bit times on all architectures.
_TOOLS_OF = {
    "stable": (*_TOOLS, "libglib2.0-0", "libtirpc3", "libssl3", "libmspack0"),
    "newest": (
        *(*_TOOLS, "libglib2.0-0t64", "libtirpc3t64", "libssl3t64", "libmspack0t64"),
        "libatomic1",
    ),
}


def vmware_tools(name: str) -> dict[str, bytes]:
    """Return Debian 12's (``stable``) or 13's (``newest``) open-vm-tools as files of a guest."""

    def fill(folder: Path) -> None:
        _SUITES[name].unpack(folder, *_TOOLS_OF[name])

    root = cached(f"vmware-tools-{name}", fill)
    programs = [*root.glob("usr/bin/vm*"), *root.glob("usr/lib/**/open-vm-tools/**/*.so")]
    scripts = [path for path in root.glob("etc/vmware-tools/**/*") if path.is_file()]
    files = [path for path in (*programs, *scripts) if path.is_file()]
    return {
        **_libraries(root),
        **{f"/{path.relative_to(root)}": path.read_bytes() for path in files},
    }


_ERLANG = (
    *("base", "asn1", "crypto", "eldap", "ftp", "inets", "mnesia", "os-mon", "parsetools"),
    *("public-key", "runtime-tools", "snmp", "ssl", "syntax-tools", "tftp", "tools", "xmerl"),
)

#: Replaces Debian's script, which contains an absolute path.
_ERL = """\
#!/bin/sh
export ROOTDIR="$(dirname "$(dirname "$(readlink -f "$0")")")/usr/lib/erlang"
export BINDIR="$(echo "$ROOTDIR"/erts-*/bin)" EMU=beam PROGNAME=erl
exec "$BINDIR/erlexec" "$@"
"""


def rabbitmq() -> str:
    """Return the ``PATH`` prefix of Debian's RabbitMQ, unpacked without a service."""

    def fill(folder: Path) -> None:
        _STABLE.unpack(folder, "rabbitmq-server", *(f"erlang-{part}" for part in _ERLANG))
        script = folder / "bin/erl"
        script.parent.mkdir(exist_ok=True)
        script.write_text(_ERL)
        script.chmod(0o755)

    root = cached("rabbitmq", fill)
    places = root / "bin", root / "usr/lib/rabbitmq/bin", root / "usr/bin"
    path = os.pathsep.join(map(str, places))
    # Built for Debian 12, with most of its libraries from this machine: check that it runs.
    run(str(places[0] / "erl"), "-noshell", "-eval", "crypto:start(), halt().")
    return path


def ganesha() -> Path:
    """Return the directory of Debian's nfs-ganesha, unpacked with rpcbind."""

    def fill(folder: Path) -> None:
        libraries = ("libntirpc4.3", "liburcu8", "libnfsidmap1", "libwbclient0", "libtirpc3")
        _STABLE.unpack(folder, "nfs-ganesha", "nfs-ganesha-vfs", "rpcbind", "libwrap0", *libraries)

    root = cached("ganesha", fill)
    libraries = f"{root}/usr/lib/x86_64-linux-gnu:{root}/usr/lib/ganesha"
    # Built for Debian 12, with most of its libraries from this machine: check that it runs.
    run(str(root / "usr/bin/ganesha.nfsd"), "-v", LD_LIBRARY_PATH=libraries)
    return root


def redis() -> Path:
    """Return the directory of Debian's redis-server and redis-benchmark."""

    def fill(folder: Path) -> None:
        libraries = ("libjemalloc2", "liblzf1", "liblua5.1-0", "lua-cjson", "lua-bitop")
        _STABLE.unpack(folder, "redis-server", "redis-tools", "libatomic1", *libraries)

    root = cached("redis", fill)
    libraries = f"{root}/usr/lib/x86_64-linux-gnu"
    # Built for Debian 12, with most of its libraries from this machine: check that it runs.
    run(str(root / "usr/bin/redis-server"), "--version", LD_LIBRARY_PATH=libraries)
    return root


def http2_proxy() -> tuple[list[str], list[str]]:
    """Return the commands of nghttpx, and of the forward proxy tinyproxy."""

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


def qemu_agent() -> tuple[str, ...]:
    """Return the command of Debian's qemu-ga."""

    def fill(folder: Path) -> None:
        libraries = ("libglib2.0-0", "liburing2", "libudev1", "libnuma1", "libpcre2-8-0")
        _STABLE.unpack(folder, "qemu-guest-agent", *libraries)

    root = cached("qemu-agent", fill)
    libraries = f"LD_LIBRARY_PATH={root / 'usr/lib/x86_64-linux-gnu'}"
    command = ("env", libraries, str(root / "usr/sbin/qemu-ga"))
    run(*command, "--version")
    return command


#: mdlayher/vsock with what its own tests import.
_GO = (
    *("golang-github-mdlayher-vsock-dev", "golang-github-mdlayher-socket-dev"),
    *("golang-golang-x-net-dev", "golang-golang-x-sys-dev", "golang-golang-x-sync-dev"),
    "golang-github-google-go-cmp-dev",
)

_GO_RPC = (
    *("golang-google-grpc-dev", "golang-google-genproto-dev", "golang-golang-x-text-dev"),
    *("golang-github-golang-protobuf-1-3-dev", "golang-github-gogo-protobuf-dev"),
    *("golang-github-containerd-ttrpc-dev", "golang-github-sirupsen-logrus-dev"),
    "golang-github-pkg-errors-dev",
)


def go_libraries() -> Path:
    """Return the ``GOPATH`` with Debian's Go libraries that most examples use."""

    def fill(folder: Path) -> None:
        _STABLE.unpack(folder, *_GO)

    return cached("go-libraries", fill) / "usr/share/gocode"


def go_rpc() -> Path:
    """Return the ``GOPATH`` with gRPC and ttrpc, which need :func:`go_libraries` as well."""

    def fill(folder: Path) -> None:
        _STABLE.unpack(folder, *_GO_RPC)

    return cached("go-rpc", fill) / "usr/share/gocode"


#: A relative path is one from the parent of the file's folder.
_CARGO = """\
[source.crates-io]
replace-with = "debian"
[source.debian]
directory = "usr/share/cargo/registry"
"""


def rust_libraries() -> Path:
    """Return the ``CARGO_HOME`` with Debian's Rust libraries that the examples use."""

    def fill(folder: Path) -> None:
        crates = _STABLE.with_dependencies("librust-tokio-vsock-dev", "librust-ttrpc-dev")
        _STABLE.unpack(folder, *crates)
        home = folder / "cargo-home"
        home.mkdir()
        (home / "config.toml").write_text(_CARGO)

    return cached("crates", fill) / "cargo-home"


#: Debian 13's systemd-notify with its libraries.
_SYSTEMD = (
    *("systemd", "libsystemd-shared", "libsystemd0", "libc6", "libmount1", "libblkid1", "libcap2"),
    *("libselinux1", "libpcre2-8-0", "libacl1", "libaudit1", "libcap-ng0", "libcrypt1"),
    *("libseccomp2", "libssl3t64", "libpam0g"),
)


def systemd_notify() -> Path:
    """Return a systemd-notify of 254 or later, which knows vSockets."""

    def fill(folder: Path) -> None:
        _SUITES["newest"].unpack(folder, *_SYSTEMD)
        libraries = "$root/usr/lib/x86_64-linux-gnu"
        tool = folder / "systemd-notify"
        tool.write_text(
            "#!/bin/sh\n"
            'root=$(dirname "$(readlink -f "$0")")\n'
            f'exec "{libraries}/ld-linux-x86-64.so.2" --library-path '
            f'"{libraries}:{libraries}/systemd" "$root/usr/bin/systemd-notify" "$@"\n'
        )
        tool.chmod(0o755)

    tool = cached("systemd", fill) / "systemd-notify"
    run(str(tool), "--version")
    return tool


def unavailable_line(name: str, error: Unavailable) -> str:
    """Return a line about software that is not available here, which is not a failure."""
    missing = re.search(r"([\w.+-]+\.so[\w.]*): cannot open shared object", str(error))
    why = f"this machine has no {missing[1]}" if missing else str(error)
    return f"{name}: not used here, and tests that need it are skipped ({why})"


def main() -> None:
    """Fetch everything; report what is not available and leave it to the tests to skip."""
    everything: dict[str, Callable[[], object]] = {
        "QEMU": qemu,
        "Linux, Debian 12's": lambda: kernel("stable"),
        "Linux, Debian 12's backport": lambda: kernel("backports"),
        "Linux, the newest backport": lambda: kernel("newest"),
        "a guest's programs, Debian 12's": userland,
        "a guest's programs, Debian 13's": lambda: userland("newest"),
        "the modules of python3-minimal": minimal_modules,
        "a guest's ctypes": ctypes_library,
        "a guest's pyfuse3": storage_client,
        "open-vm-tools, Debian 12's": lambda: vmware_tools("stable"),
        "open-vm-tools, Debian 13's": lambda: vmware_tools("newest"),
        "vhost-device-vsock": rust_back_end,
        "RabbitMQ": rabbitmq,
        "nghttpx and tinyproxy": http2_proxy,
        "nfs-ganesha": ganesha,
        "Go libraries": go_libraries,
        "Rust libraries": rust_libraries,
        "systemd-notify": systemd_notify,
        "qemu-ga": qemu_agent,
    }
    for name, fetch in everything.items():
        began = time.monotonic()
        try:
            fetch()
        except Unavailable as error:
            print(unavailable_line(name, error), flush=True)
        else:
            print(f"{name}: ready after {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
