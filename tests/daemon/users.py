"""Programs of other users, with other rights, that send requests to vsockd."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vsockets.protocol import Record, Request
from vsockets.testing import PrivateFabric

from .raw_client import PROMPT

NOBODY = 65_534

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as another user")

CAP_NET_BIND_SERVICE = 10
CAP_NET_ADMIN = 12
CAP_SYS_ADMIN = 21


def has_capability(capability: int, pid: int | None = None) -> bool:
    status = Path(f"/proc/{pid or 'self'}/status").read_text()
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    return bool(effective >> capability & 1)


#: Not true for the root of most containers, which may create no namespaces.
as_administrator = pytest.mark.skipif(
    not has_capability(CAP_SYS_ADMIN), reason="needs CAP_SYS_ADMIN"
)


as_network_administrator = pytest.mark.skipif(
    not has_capability(CAP_NET_ADMIN), reason="needs CAP_NET_ADMIN"
)


@contextlib.contextmanager
def user(uid: int) -> Iterator[None]:
    """Act as this user, without privileges unless it is root, in all threads and in /proc."""
    before = os.geteuid()
    os.seteuid(0)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.seteuid(before)


def as_nobody(*command: str) -> list[str]:
    """Return the command to run as a user without privileges if this process is root."""
    if os.geteuid() != 0:
        return list(command)
    # Python may be in a folder that only root enters.
    kept = "-all,+dac_override,+dac_read_search"
    caps = ("--inh-caps", kept, "--ambient-caps", kept, "--bounding-set", kept)
    return ["setpriv", "--reuid", str(NOBODY), "--clear-groups", *caps, *command]


def ask_by_program(
    program: Path,
    fabric: PrivateFabric,
    request: Request,
    *before: str,
    groups: tuple[int, ...] = (),
) -> Record:
    """Return vsockd's reply to ``request_client`` on the host, run as user nobody by ``before``."""
    done = subprocess.run(
        [*before, program, fabric.host.folder / "seqpacket"],
        input=request.encode(),
        capture_output=True,
        timeout=2 * PROMPT,
        check=True,
        user=None if before else NOBODY,
        group=None if before else NOBODY,
        extra_groups=None if before else groups,
    )
    return Record.decode(done.stdout)
