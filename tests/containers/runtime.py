"""Run a command as a container runtime would: its system call filter, capabilities, name spaces.

``python runtime.py --profile docker [OPTION...] -- COMMAND`` needs root, or user name spaces.
The filter is compiled by libseccomp, as the runtimes do, from the facts about a runtime's default
profile, or from a file in the runtimes' format (JSON).  The command is process 1 of its pid name
space; it sees a private ``/tmp``, a ``/dev`` with the devices of every container, and a network of
its own with nothing but loopback.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import fcntl
import json
import os
import resource
import socket
import struct
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vsockets.cli.seccomp_profile import Runtime, load_facts

TESTS = Path(__file__).parents[1]

#: What Docker, Podman and containerd leave to a container's root.
DEFAULT_CAPABILITIES = (
    *("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID"),
    *("CAP_SETUID", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SYS_CHROOT"),
    *("CAP_MKNOD", "CAP_AUDIT_WRITE", "CAP_SETFCAP"),
)
#: linux/capability.h.
CAPABILITIES = {
    name: number
    for number, name in enumerate(
        (
            *("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID"),
            *("CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE"),
            *("CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN", "CAP_NET_RAW"),
            *("CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO"),
            *("CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN"),
            *("CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE", "CAP_SYS_TIME"),
            *("CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE"),
            *("CAP_AUDIT_CONTROL", "CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN"),
            *("CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ"),
            *("CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE"),
        )
    )
}

_DEVICES = ("full", "null", "random", "tty", "urandom", "zero")
_NEW_NS, _NEW_IPC, _NEW_UTS = 0x2_0000, 0x800_0000, 0x400_0000
_NEW_USER, _NEW_PID, _NEW_NET = 0x1000_0000, 0x2000_0000, 0x4000_0000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_SIGKILL = 9

# seccomp.h of libseccomp.
_ALLOW, _ERRNO = 0x7FFF_0000, 0x0005_0000
_EQUAL, _MASKED_EQUAL = 4, 7
_CONTROL_NO_NEW_PRIVS = 3
_SUB_ARCHITECTURES = {"x86_64": (0x4000_0003, 0x4000_003E), "aarch64": (0x4000_0028,)}

libc = ctypes.CDLL(None, use_errno=True)


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


def check(result: int, what: str) -> int:
    """Raise OSError with ``errno`` when a call of the C library failed."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def load_profile(name: str) -> dict[str, Any]:
    """Return a runtime's profile, or that of a file.  Raises FileNotFoundError."""
    if name.endswith(".json"):
        profile: dict[str, Any] = json.loads(Path(name).read_text())
        return profile
    return load_facts(Runtime(name))


class Filter:
    """A filter in the making."""

    def __init__(self, default: int) -> None:
        self._library = ctypes.CDLL("libseccomp.so.2")
        self._library.seccomp_init.restype = ctypes.c_void_p
        self._default = default
        self._context = ctypes.c_void_p(self._library.seccomp_init(ctypes.c_uint32(default)))
        self._library.seccomp_attr_set(self._context, _CONTROL_NO_NEW_PRIVS, ctypes.c_uint32(0))

    def add_architecture(self, token: int) -> None:
        """Have the rules hold for another architecture's calls, too."""
        self._library.seccomp_arch_add(self._context, ctypes.c_uint32(token))

    def add(self, action: int, name: str, *comparisons: _Comparison) -> None:
        """Add a rule; a call that this libseccomp does not know has the default action."""
        number = self._library.seccomp_syscall_resolve_name(name.encode())
        if number == -1 or action == self._default:
            return
        array = (_Comparison * len(comparisons))(*comparisons)
        arguments = (ctypes.c_uint32(action), number, ctypes.c_uint(len(comparisons)), array)
        result = self._library.seccomp_rule_add_array(self._context, *arguments)
        if result < 0:
            raise OSError(-result, f"the rule of {name}: {os.strerror(-result)}")

    def export(self) -> bytes:
        """Return the filter's program."""
        with open(os.memfd_create("filter"), "r+b") as file:
            assert self._library.seccomp_export_bpf(self._context, file.fileno()) == 0
            file.seek(0)
            return file.read()

    def load(self) -> None:
        """Put this process under the filter, for good."""
        result = self._library.seccomp_load(self._context)
        if result < 0:
            raise OSError(-result, f"loading the filter: {os.strerror(-result)}")


def compile_filters(
    profile: dict[str, Any], capabilities: Iterable[str], forbidden: Iterable[str] = ()
) -> list[Filter]:
    """Return the filters of ``profile`` for a container with ``capabilities``.

    ``forbidden`` calls are refused as those that the profile does not name.
    """
    if "syscalls" in profile:
        return [_compile_document(profile, capabilities)]
    filters = []
    default = _ERRNO | getattr(errno, profile["default"])
    refused = _ERRNO | getattr(errno, profile["family_errno"])
    made = Filter(default)
    for architecture in _SUB_ARCHITECTURES.get(os.uname().machine, ()):
        made.add_architecture(architecture)
    allowed = set(profile["allow"].split())
    for capability in capabilities:
        allowed.update(profile["capability"].get(capability, "").split())
    allowed.difference_update(forbidden)
    families = range(46)  # AF_MAX
    if refused == default:
        for family in families:
            if family in profile["families"]:
                made.add(_ALLOW, "socket", _Comparison(0, _EQUAL, family))
    else:  # 32-bit x86 cannot tell families apart, so that one filter cannot say both
        allowed.add("socket")
        before = Filter(_ALLOW)
        for family in set(families) - set(profile["families"]):
            before.add(refused, "socket", _Comparison(0, _EQUAL, family))
        filters.append(before)
    for name in sorted(allowed):
        made.add(_ALLOW, name)
    for name, calls in profile["errno"].items():
        for call in calls.split():
            if call not in allowed:
                made.add(_ERRNO | getattr(errno, name), call)
    for value in profile["personality"]:
        made.add(_ALLOW, "personality", _Comparison(0, _EQUAL, value))
    flags = profile.get("clone_forbidden_flags")
    if flags and "clone" not in allowed:
        made.add(_ALLOW, "clone", _Comparison(0, _MASKED_EQUAL, flags, 0))
    return [*filters, made]


_ACTIONS = {"SCMP_ACT_ALLOW": _ALLOW, "SCMP_ACT_ERRNO": _ERRNO}
_OPERATORS = {"SCMP_CMP_EQ": _EQUAL, "SCMP_CMP_MASKED_EQ": _MASKED_EQUAL}


def _compile_document(profile: dict[str, Any], capabilities: Iterable[str]) -> Filter:
    """Return the filter of a profile in the runtimes' format."""
    made = Filter(_ACTIONS[profile["defaultAction"]] | profile["defaultErrnoRet"])
    for architecture in _SUB_ARCHITECTURES.get(os.uname().machine, ()):
        made.add_architecture(architecture)
    own = set(capabilities)
    for rule in profile["syscalls"]:
        included: list[str] = rule.get("includes", {}).get("caps", [])
        if not own.issuperset(included) or own & {*rule.get("excludes", {}).get("caps", [])}:
            continue
        comparisons = [
            _Comparison(one["index"], _OPERATORS[one["op"]], one["value"], one["valueTwo"])
            for one in rule.get("args", [])
        ]
        for name in rule["names"]:
            made.add(_ACTIONS[rule["action"]] | rule.get("errnoRet", 0), name, *comparisons)
    return made


def install_filters(*arguments: Any) -> None:
    """Put this process under the filters of a profile (see :func:`compile_filters`)."""
    for one in compile_filters(*arguments):
        one.load()


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    """Call ``mount(2)``."""
    encoded = (source.encode(), target.encode(), kind.encode())
    check(libc.mount(*encoded, ctypes.c_ulong(flags), options.encode()), f"mounting {target}")


def enter_name_spaces(user: int, group: int, network: bool) -> None:
    """Enter new name spaces; without root, a user name space too, where we are ``user``."""
    flags = _NEW_NS | _NEW_PID | _NEW_IPC | _NEW_UTS | (_NEW_NET if network else 0)
    uid, gid = os.geteuid(), os.getegid()
    if uid != 0:
        flags |= _NEW_USER
    check(libc.unshare(flags), "new name spaces")
    if uid != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {gid} 1")
    if network:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            fcntl.ioctl(sock, 0x8914, struct.pack("16sH14x", b"lo", 0x1 | 0x40))  # SIOCSIFFLAGS


def arrange_files(kept: Sequence[Path], read_only: bool) -> None:
    """Give the container its own /proc, /dev and /tmp; ``kept`` stay visible and writable."""
    mount("none", "/", "none", _MS_REC | _MS_PRIVATE)
    for path in kept:  # mounts of their own: the root's becomes read-only
        mount(str(path), str(path), "none", _MS_BIND | _MS_REC)
    descriptors = [(path, os.open(path, os.O_PATH)) for path in kept]
    devices = [(name, os.open(f"/dev/{name}", os.O_PATH)) for name in _DEVICES]
    if read_only:
        mount("none", "/", "none", _MS_BIND | _MS_REMOUNT | _MS_RDONLY)
    mount("proc", "/proc", "proc")
    mount("tmpfs", "/tmp", "tmpfs", 0, "mode=1777")
    mount("tmpfs", "/dev", "tmpfs", 0, "mode=755")
    os.mkdir("/dev/shm", 0o777)
    mount("tmpfs", "/dev/shm", "tmpfs", 0, "mode=1777")
    os.mkdir("/dev/pts")
    mount("devpts", "/dev/pts", "devpts", 0, "newinstance,ptmxmode=0666,mode=620")
    os.symlink("pts/ptmx", "/dev/ptmx")
    os.symlink("/proc/self/fd", "/dev/fd")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"/dev/{name}")
    for name, fd in devices:
        Path("/dev", name).touch()
        mount(f"/proc/self/fd/{fd}", f"/dev/{name}", "none", _MS_BIND)
    for path, fd in descriptors:
        path.mkdir(parents=True, exist_ok=True)
        mount(f"/proc/self/fd/{fd}", str(path), "none", _MS_BIND | _MS_REC)
    for _, fd in (*devices, *descriptors):
        os.close(fd)


def limit_bounding_set(capabilities: Iterable[str]) -> None:
    """Let no program get other capabilities than these."""
    kept = {CAPABILITIES[name] for name in capabilities}
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for number in range(last + 1):
        if number not in kept:
            check(libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0), "the bounding set")


def set_capabilities(capabilities: Iterable[str]) -> None:
    """Give up all other capabilities than these."""
    mask = sum(1 << CAPABILITIES[name] for name in capabilities)
    low, high = mask & 0xFFFF_FFFF, mask >> 32
    header = struct.pack("=Ii", 0x2008_0522, 0)  # _LINUX_CAPABILITY_VERSION_3
    data = struct.pack("=6I", low, low, 0, high, high, 0)
    check(libc.capset(header, data), "capset")


def contain(arguments: argparse.Namespace) -> NoReturn:
    """Become the command in its container."""
    parent = os.getpid()
    enter_name_spaces(arguments.user, arguments.user, arguments.network == "none")
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.kill(parent, os.WTERMSIG(status))
        os._exit(os.waitstatus_to_exitcode(status))
    check(libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0), "prctl")
    # Before /tmp is another one, in which this file's folder may be.
    profile = None if arguments.profile == "unconfined" else load_profile(arguments.profile)
    arrange_files(arguments.keep, arguments.read_only)
    capabilities = () if arguments.capabilities == "none" else DEFAULT_CAPABILITIES
    if arguments.no_new_privileges:
        check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    elif profile is not None:  # while we may
        install_filters(profile, capabilities, arguments.forbid)
    limit_bounding_set(capabilities)
    with contextlib.suppress(PermissionError):  # not in a user name space
        os.setgroups([])
    os.setresgid(*(arguments.user,) * 3)
    os.setresuid(*(arguments.user,) * 3)
    if arguments.user == 0:
        set_capabilities(capabilities)
    if arguments.no_new_privileges and profile is not None:
        install_filters(profile, capabilities, arguments.forbid)
    os.execvp(arguments.command[0], arguments.command)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="docker", help="a runtime, a file, or unconfined")
    parser.add_argument("--forbid", action="append", default=[], help="a call to refuse as well")
    parser.add_argument("--user", type=int, default=0, help="user and group id in the container")
    parser.add_argument("--capabilities", choices=("default", "none"), default="default")
    parser.add_argument("--no-new-privileges", action="store_true")
    parser.add_argument(
        "--read-only", action="store_true", help="the root file system is read-only"
    )
    parser.add_argument("--network", choices=("none", "host"), default="none")
    parser.add_argument("--keep", type=Path, action="append", default=[], help="a writable folder")
    parser.add_argument("command", nargs="+")
    return parser.parse_args(words)


if __name__ == "__main__":
    try:
        contain(parse())
    except OSError as error:
        sys.exit(f"runtime.py: {error}")
