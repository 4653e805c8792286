"""For pytest in a guest: ``tests/library`` on the guest kernel's own AF_VSOCK, looped back.

The tests' fabric is the one machine there is, and its host and guests are all that machine, which
reaches itself by VMADDR_CID_LOCAL.
"""

from __future__ import annotations

import os

import pytest

from vsockets import VMADDR_CID_LOCAL
from vsockets.kernel import Kernel


class Loopback(Kernel):
    """The machine, as it sees itself."""

    cid = VMADDR_CID_LOCAL


class KernelFabric:
    """What tests ask of a fabric, as far as there is one."""

    host = Loopback()

    def guest(self) -> Loopback:
        return self.host

    def environment(self, context: Loopback) -> dict[str, str]:
        return {**os.environ}


@pytest.fixture
def vsock_fabric() -> KernelFabric:
    return KernelFabric()
