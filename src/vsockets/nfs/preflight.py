"""A check that this machine can mount an export."""

from __future__ import annotations

import errno
import os
import shutil
import sys

DEVICE = "/dev/fuse"


def check(device: str = DEVICE) -> None:
    """Check that this machine has what mounting an export needs.

    Raises OSError with one line that says what is missing and how to install it.
    """
    try:
        import pyfuse3  # noqa: F401
    except ImportError as error:
        from ..extras import how_to_install  # imported here: seldom needed

        remedy = how_to_install("nfs")
        if sys.prefix == sys.base_prefix:  # a virtual environment does not see Debian's packages
            remedy = f"apt install python3-pyfuse3, or {remedy}"
        raise OSError(f"mounting needs pyfuse3: {remedy} ({error})") from None
    try:
        os.close(os.open(device, os.O_RDWR))
    except PermissionError:
        pass  # the set-user-ID program fusermount3 has the permission
    except OSError as error:
        problem = f"{device}: {error.strerror}; modprobe fuse, or use a kernel with FUSE"
        raise OSError(error.errno, problem) from None
    if os.geteuid() == 0:
        return
    if shutil.which("fusermount3") is None:
        raise OSError("mounting without root needs fusermount3: apt install fuse3")
    if _has_no_new_privileges():
        problem = (
            "mounting without root needs fusermount3's set-user-ID bit, which has no effect here"
        )
        remedy = "leave vsock run, or the program that set no_new_privs"
        if context := os.environ.get("VSOCKETS_CONTEXT"):
            remedy = f"mount outside of vsock run, with VSOCKETS_CONTEXT={context}"
        raise OSError(errno.EPERM, f"{problem}: {remedy}")


def _has_no_new_privileges() -> bool:
    """Return whether no_new_privs is set, so that set-user-ID programs gain no rights."""
    with open("/proc/self/status") as status:
        return any(line.split() == ["NoNewPrivs:", "1"] for line in status)
