"""For pytest in a guest: ``tests/library`` on the guest kernel's own AF_VSOCK.

The tests' guest is the machine.  Their host is the machine, too, which reaches itself by
VMADDR_CID_LOCAL; or, where ``VSOCKETS_TEST_HOST`` has the port of its servant, the fabric's host.
"""

from __future__ import annotations

import os

import pytest

from vm.remote import Remote
from vsockets import VMADDR_CID_LOCAL
from vsockets.kernel import Kernel


class Loopback(Kernel):
    """The machine, as it sees itself."""

    cid = VMADDR_CID_LOCAL


_port = os.environ.get("VSOCKETS_TEST_HOST")
_host: Kernel = Remote(int(_port)) if _port else Loopback()
_guest = Kernel() if _port else _host


class KernelFabric:
    """What tests ask of a fabric, as far as there is one."""

    host = _host

    def guest(self) -> Kernel:
        return _guest

    def environment(self, context: Kernel) -> dict[str, str]:
        return {**os.environ}


@pytest.fixture
def vsock_fabric() -> KernelFabric:
    return KernelFabric()
