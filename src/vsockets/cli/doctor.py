"""``vsock doctor``: what this machine supports, and what to install.

No check changes anything, or opens an AF_VSOCK socket or ``/dev/vsock``: that would load kernel
modules.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import grp
import json
import os
import platform
import shutil
import socket as stdlib
import stat
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import click

from .._linux.inspection import SYS_PIDFD_GETFD, effective_capabilities, status_field
from .._linux.libc import libc
from ..api import create_server
from ..model.constants import VMADDR_CID_HOST
from ..socket import socket
from ..supervisor.arch import this_architecture
from ..supervisor.mechanism import refusal
from ..supervisor.ptrace import Ptrace
from ..testing import PrivateFabric
from .groups import command
from .options import json_option, members
from .output import Column, print_json, print_table
from .seccomp_profile import Runtime, make_profile

#: Seconds that a program started by a check may take.
_PATIENCE = 10.0

#: Width of the table in a pipe or file, such as a CI job's log, in characters; programs have
#: ``--json``.
_WIDTH = 80

#: Advice for a container that forbids a system call.
RUNTIME_OPTION = "a container with a profile of vsock doctor --seccomp-profile"

_CLONE_NEWUSER = 0x10000000

#: The inode of the first pid namespace (PROC_PID_INIT_INO): containers have others.
_FIRST_PID_NAMESPACE = 0xEFFF_FFFC

_CAP_SYS_ADMIN = 21

#: Advice where vsock run does not depend on what is missing.
_NOTHING = "nothing: vsock run works without it"

#: Options of a container in which a file system in user space can be mounted.
_FUSE_OPTIONS = "--device /dev/fuse --cap-add SYS_ADMIN"


@command("doctor")
@json_option
@click.option(
    "--seccomp-profile",
    "runtime",
    **members(Runtime),
    metavar="RUNTIME",
    help="Write a seccomp profile instead: the default one of docker, podman or kubernetes, with "
    "the system calls that vsock run needs.",
)
@click.pass_context
def doctor(context: click.Context, as_json: bool, runtime: Runtime | None) -> None:
    """Check what this machine supports, and what to install.

    The exit status is 1 if not even the fabric works.
    """
    if runtime is not None:
        click.echo(json.dumps(make_profile(runtime), indent=1))
        return
    findings = {check: check() for check in CHECKS}
    if as_json:
        print_json([finding._asdict() for finding in findings.values()])
    else:
        columns = [
            Column("WHAT", whole=False),
            Column(""),
            Column("DETAIL", whole=False),
            Column("TO INSTALL", whole=False),
        ]
        print_table(columns, findings.values(), piped=_WIDTH)
    if findings[fabric].state != "yes":
        context.exit(1)


class Finding(NamedTuple):
    """Result of one check: its subject, whether it is supported, and what to install if not."""

    what: str
    state: str  #: yes, no or partly
    detail: str
    install: str = ""


def fabric() -> Finding:
    """Start a private vsockd, and pass a stream and a datagram between a guest and the host."""
    what = "fabric (vsockd)"
    try:
        started = time.perf_counter()
        with PrivateFabric() as private:
            up = time.perf_counter() - started
            guest = private.guest()
            with (
                create_server((VMADDR_CID_HOST, 5000), context=private.host) as server,
                socket(context=guest) as client,
            ):
                client.settimeout(_PATIENCE)
                client.connect((VMADDR_CID_HOST, 5000))
                accepted, _ = server.accept()
                with accepted:
                    accepted.settimeout(_PATIENCE)
                    client.sendall(b"stream")
                    stream = accepted.recv(100)
            with (
                socket(type=stdlib.SOCK_DGRAM, context=private.host) as receiver,
                socket(type=stdlib.SOCK_DGRAM, context=guest) as sender,
            ):
                receiver.settimeout(_PATIENCE)
                receiver.bind((VMADDR_CID_HOST, 5000))
                sender.sendto(b"datagram", (VMADDR_CID_HOST, 5000))
                datagram, source = receiver.recvfrom(100)
            if (stream, datagram, source[0]) != (b"stream", b"datagram", guest.cid):
                return Finding(what, "no", f"got {stream!r}, and {datagram!r} from {source}")
    except Exception as error:  # any failure is a finding
        return Finding(what, "no", f"{error}".strip().rpartition("\n")[2], "see: vsockd --help")
    return Finding(what, "yes", f"a stream and a datagram arrived; vsockd started in {up:.2f} s")


def python() -> Finding:
    """Name the versions of the interpreter, and of the libraries of the command line."""
    compiled = "has" if hasattr(stdlib, "AF_VSOCK") else "lacks"
    libraries = ", ".join(f"{name} {version(name)}" for name in ("click", "rich"))
    detail = f"{platform.python_version()}, socket {compiled} AF_VSOCK; {libraries}"
    return Finding("Python", "yes", detail)


def seccomp() -> Finding:
    """Install a seccomp filter with a listener in a child, as ``vsock run`` does."""
    what = "seccomp notification"
    script = """
from vsockets.supervisor import filter, arch as machine, notification
here = machine.this_architecture()
notification.install(here, filter.assemble(here, []))
print("yes")
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    output = _output(sys.executable, "-c", script, env=environment).strip()
    if output != "yes":
        why = output.rpartition("\n")[2].rpartition(": ")[2] or "not in this kernel"
        return Finding(what, "no", why, "Linux 5.14 or later, and a container that allows it")
    scope = _read("/proc/sys/kernel/yama/ptrace_scope").strip()
    if scope in ("2", "3") and os.geteuid() != 0:
        advice = "sysctl kernel.yama.ptrace_scope=1"
        return Finding(
            what, "partly", f"programs' memory cannot be read: ptrace_scope {scope}", advice
        )
    if refusal():
        why = "a seccomp filter refuses AF_VSOCK: vsock run traces programs instead (ptrace)"
        return Finding(what, "partly", why, _NOTHING)
    return Finding(what, "yes", "vsock run can supervise any program")


def tracing() -> Finding:
    """Trace a child, as ``vsock run`` does for datagram sockets."""
    what = "ptrace"
    try:
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as child:
            Ptrace(this_architecture()).seize(child.pid)
            child.kill()
    except (OSError, NotImplementedError) as error:
        scope = _read("/proc/sys/kernel/yama/ptrace_scope").strip() or "unknown"
        return Finding(
            what,
            "no",
            f"{error}; ptrace_scope {scope}: vsock run has no datagrams and no MSG_EOR, and "
            "nothing where a filter refuses AF_VSOCK",
            f"sysctl kernel.yama.ptrace_scope=1, and {RUNTIME_OPTION}",
        )
    if refusal():
        return Finding(what, "yes", "vsock run can trace any program")
    return Finding(what, "yes", "vsock run supports datagram sockets of any program")


def pidfd() -> Finding:
    """Copy a child's descriptor by pidfd_getfd(2), as vsockd does to close a stream."""
    what = "pidfd_getfd"
    try:
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as child:
            handle = os.pidfd_open(child.pid)
            copied = libc.syscall(SYS_PIDFD_GETFD, handle, 0, 0)
            reason = os.strerror(ctypes.get_errno())
            os.close(handle)
    except OSError as error:
        return Finding(what, "no", str(error.strerror), "Linux 5.6 or later")
    if copied >= 0:
        os.close(copied)
        return Finding(what, "yes", "vsockd can close streams of any program")
    problem = _shut_down_by_ptrace()
    if not problem:
        detail = f"{reason}: vsockd closes streams by ptrace instead"
        return Finding(what, "partly", detail, f"{RUNTIME_OPTION}, or nothing")
    scope = _read("/proc/sys/kernel/yama/ptrace_scope").strip() or "unknown"
    detail = (
        f"{reason}; ptrace: {problem}; ptrace_scope {scope}: suspended guests' streams stay open"
    )
    return Finding(what, "no", detail, RUNTIME_OPTION)


def _shut_down_by_ptrace() -> str:
    """Shut down a child's socket as vsockd does without pidfd_getfd; return the problem, if any."""
    from ..supervisor.remote_shutdown import Attempt, Target

    ours, theirs = stdlib.socketpair()
    with ours, theirs:
        inode = os.fstat(theirs.fileno()).st_ino
        with subprocess.Popen(["cat"], stdin=theirs.fileno(), stdout=subprocess.DEVNULL) as child:
            try:
                attempt = Attempt(child.pid, [Target(inode)])
                done, problem = attempt.result()
            finally:
                child.kill()
    return problem if not done else ""


def kernel_vsock() -> Finding:
    """Look for the kernel's own AF_VSOCK, in /proc and /sys only."""
    modules = {line.split()[0] for line in _read("/proc/modules").splitlines()}
    modules |= {path.name for path in Path("/sys/module").glob("*vsock*")}
    found = sorted(name for name in modules if "vsock" in name)
    if Path("/dev/vsock").exists():
        found.append("/dev/vsock")
    if ("vsock" in modules or "/dev/vsock" in found) and (code := refusal()):
        name = errno.errorcode.get(code, str(code))
        detail = f"{', '.join(found)}, and a seccomp filter that refuses AF_VSOCK ({name})"
        return Finding("kernel AF_VSOCK", "no", detail, _NOTHING)
    if "vsock" in modules or "/dev/vsock" in found:
        return Finding("kernel AF_VSOCK", "yes", ", ".join(found))
    available = Path("/lib/modules", platform.release(), "kernel/net/vmw_vsock").is_dir()
    if available:
        return Finding("kernel AF_VSOCK", "partly", "its modules are not loaded", "modprobe vsock")
    return Finding("kernel AF_VSOCK", "no", "no module, no /dev/vsock", "a kernel with VSOCKETS")


def vhost_vsock() -> Finding:
    """Check the kernel's device for QEMU's vhost-vsock-pci."""
    path = "/dev/vhost-vsock"
    if not os.path.exists(path):
        return Finding(
            path, "no", "missing", _for_container(f"--device {path}", "modprobe vhost_vsock")
        )
    return _accessible(path)


def kvm() -> Finding:
    """Check whether this user can use hardware virtualization."""
    if not os.path.exists("/dev/kvm"):
        advice = "a CPU with virtualization, nested if this is a VM"
        advice = _for_container("--device /dev/kvm", advice)
        return Finding("KVM", "no", "no /dev/kvm: virtual machines are emulated", advice)
    return _accessible("/dev/kvm")._replace(what="KVM")


def qemu() -> Finding:
    """Look for a QEMU for each of the devices; a QEMU that is too old is no failure."""
    from ..vm.qemu import REQUIREMENTS, QemuNotFound, find

    found, missing = {}, {}
    for device in REQUIREMENTS:
        try:
            found[device] = find(device)
        except QemuNotFound as error:
            missing[device] = str(error)
    details = [f"{device}: {one.path} {one.version_text}" for device, one in found.items()]
    details += [f"{device}: {why.partition(': ')[0]}" for device, why in missing.items()]
    state = "yes" if not missing else "partly" if found else "no"
    advice = "; ".join(why.partition(": ")[2] for why in missing.values())
    return Finding("QEMU", state, "; ".join(details), advice)


def virtual_machines() -> Finding:
    """Check what vsock vm needs besides QEMU."""
    from ..vm.apt import Unavailable, system_suite

    missing = {}
    try:
        import qemu.qmp  # noqa: F401
    except ModuleNotFoundError:
        missing["run needs the Python package qemu.qmp"] = "pip install qemu.qmp"
    if shutil.which("setpriv") is None:
        missing["run needs setpriv"] = "util-linux"
    state = "no" if missing else "yes"
    try:
        suite = system_suite()
        keys = Path(suite.distribution.keys)
        if not keys.exists():
            missing[f"demo needs {keys}"] = keys.stem
    except Unavailable as error:
        missing[f"demo: {error}"] = "Debian, or Ubuntu"
    if missing and state == "yes":
        state = "partly"
    detail = "; ".join(missing) or "run, and demo with this distribution's packages"
    return Finding("vsock vm", state, detail, "; ".join(missing.values()))


def fuse() -> Finding:
    """Check whether this user can mount a file system in user space."""
    if not os.path.exists("/dev/fuse"):
        advice = _for_container(_FUSE_OPTIONS, "modprobe fuse")
        return Finding("FUSE", "no", "no /dev/fuse", f"{advice}; fuse3")
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        return Finding("FUSE", "partly", "/dev/fuse, but no fusermount3", "fuse3")
    if not _may_mount():
        advice = _for_container(_FUSE_OPTIONS, "a process with CAP_SYS_ADMIN")
        return Finding("FUSE", "no", "/dev/fuse, but mounting is not permitted", advice)
    return _accessible("/dev/fuse")._replace(what="FUSE")


def user_namespaces() -> Finding:
    """Create a user namespace in a child, as unprivileged containers do."""
    script = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(libc.unshare({_CLONE_NEWUSER}) and os.strerror(ctypes.get_errno()))
"""
    output = _output(sys.executable, "-I", "-c", script).strip()
    if output == "0":
        return Finding("user namespaces", "yes", "users can create containers without a privilege")
    advice = "sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone"
    advice = _for_container("--security-opt seccomp=FILE that allows unshare", advice)
    return Finding("user namespaces", "no", output, advice)


CHECKS = (
    fabric,
    python,
    seccomp,
    tracing,
    pidfd,
    kernel_vsock,
    vhost_vsock,
    kvm,
    qemu,
    virtual_machines,
    fuse,
    user_namespaces,
)


_GROUP_READ_WRITE = stat.S_IRGRP | stat.S_IWGRP


def _accessible(path: str) -> Finding:
    if os.access(path, os.R_OK | os.W_OK):
        return Finding(path, "yes", f"{path} can be opened")
    status = os.stat(path)
    number = status.st_gid
    if number == 0 or status.st_mode & _GROUP_READ_WRITE != _GROUP_READ_WRITE:
        advice = f"as root: chgrp GROUP {path}; chmod 660 {path}, with a GROUP of this user"
        return Finding(path, "partly", f"{path}: permission denied", advice)
    try:
        group = grp.getgrgid(number).gr_name
    except KeyError:  # the device belongs to a container's host
        group = str(number)
    advice = _for_container(f"--group-add {number}", f"add this user to group {group}")
    return Finding(path, "partly", f"{path}: permission denied", advice)


def _is_in_container() -> bool:
    """Return whether this process is in another pid namespace than the machine's first."""
    return os.stat("/proc/self/ns/pid").st_ino != _FIRST_PID_NAMESPACE


def _for_container(option: str, otherwise: str) -> str:
    """Return ``otherwise``; in a container, precede it by ``option``, the runtime's option.

    A container has no devices but those that its runtime adds.
    """
    return (
        f"container option {option}; on its host: {otherwise}" if _is_in_container() else otherwise
    )


def _may_mount() -> bool:
    """Return whether this user may mount a file system, itself or by a set-user-ID program."""
    with open("/proc/self/status", "rb") as file:
        status = file.read()
    if os.geteuid() == 0:
        held = effective_capabilities(status)
    elif status_field(status, b"NoNewPrivs").strip() == b"1":
        held = 0
    else:
        held = int(status_field(status, b"CapBnd"), 16)
    return bool(held >> _CAP_SYS_ADMIN & 1)


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(errors="replace")
    return ""


def _output(*command: str, env: dict[str, str] | None = None) -> str:
    """Return the output of a program, or the error message if it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE, check=False, env=env
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stdout or done.stderr
