"""The public names of ``vsockets``.  A name here is a promise; adding one is a decision."""

from __future__ import annotations

import types

import vsockets
from vsockets.model import constants

FUNCTIONS = {
    "VMCISock_GetAFValue",
    "VMCISock_GetLocalCID",
    "attach",
    "create_connection",
    "create_server",
    "get_local_cid",
    "install",
    "open_connection",
    "socketpair",
    "start_server",
}
CLASSES = {"Attachment", "PeerCredentials", "socket"}
LIMITS = {"MAX_DATAGRAM"}

# vm_sockets.h and the guide, chapter 3 and the appendix of vsock(7).
NUMBERS = {
    "AF_VSOCK": 40,
    "VMADDR_CID_ANY": 2**32 - 1,
    "VMADDR_PORT_ANY": 2**32 - 1,
    "VMADDR_CID_HYPERVISOR": 0,
    "VMADDR_CID_LOCAL": 1,
    "VMADDR_CID_HOST": 2,
    "SO_VM_SOCKETS_BUFFER_SIZE": 0,
    "SO_VM_SOCKETS_BUFFER_MIN_SIZE": 1,
    "SO_VM_SOCKETS_BUFFER_MAX_SIZE": 2,
    "SO_VM_SOCKETS_PEER_HOST_VM_ID": 3,
    "SO_VM_SOCKETS_TRUSTED": 5,
    "SO_VM_SOCKETS_CONNECT_TIMEOUT": 8,
    "SO_VM_SOCKETS_CONNECT_TIMEOUT_OLD": 6,
    "SO_VM_SOCKETS_CONNECT_TIMEOUT_NEW": 8,
    "SO_VM_SOCKETS_NONBLOCK_TXRX": 7,
    "SO_VMCI_BUFFER_SIZE": 0,
    "SO_VMCI_BUFFER_MIN_SIZE": 1,
    "SO_VMCI_BUFFER_MAX_SIZE": 2,
    "SO_VMCI_PEER_HOST_VM_ID": 3,
    "SO_VMCI_TRUSTED": 5,
    "SO_VMCI_CONNECT_TIMEOUT": 6,
}


def test_public_names() -> None:
    # The name `socket` is the class, not the module it is in.
    public = {
        name
        for name, value in vars(vsockets).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public == FUNCTIONS | CLASSES | LIMITS | set(NUMBERS)
    assert public == set(vsockets.__all__)


def test_numbers_are_those_of_the_headers() -> None:
    for name, value in NUMBERS.items():
        assert getattr(constants, name) == value, name
