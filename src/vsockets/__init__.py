"""vSockets for any hypervisor and for none.

``vsockets.socket`` is a drop-in for ``socket.socket`` with AF_VSOCK.  See README.md.  Page numbers
in the documentation are those of VMware's *vSockets Programming Guide* ("the guide").
"""

from . import transports as _transports  # noqa: F401  # registers the socket classes
from .api import (
    VMCISock_GetAFValue,
    VMCISock_GetLocalCID,
    attach,
    create_connection,
    create_server,
    get_local_cid,
    socketpair,
)
from .asyncio import open_connection, start_server
from .attachment import Attachment
from .install import install
from .limits import MAX_DATAGRAM
from .model.constants import (
    AF_VSOCK,
    SO_VM_SOCKETS_BUFFER_MAX_SIZE,
    SO_VM_SOCKETS_BUFFER_MIN_SIZE,
    SO_VM_SOCKETS_BUFFER_SIZE,
    SO_VM_SOCKETS_CONNECT_TIMEOUT,
    SO_VM_SOCKETS_CONNECT_TIMEOUT_NEW,
    SO_VM_SOCKETS_CONNECT_TIMEOUT_OLD,
    SO_VM_SOCKETS_NONBLOCK_TXRX,
    SO_VM_SOCKETS_PEER_HOST_VM_ID,
    SO_VM_SOCKETS_TRUSTED,
    SO_VMCI_BUFFER_MAX_SIZE,
    SO_VMCI_BUFFER_MIN_SIZE,
    SO_VMCI_BUFFER_SIZE,
    SO_VMCI_CONNECT_TIMEOUT,
    SO_VMCI_PEER_HOST_VM_ID,
    SO_VMCI_TRUSTED,
    VMADDR_CID_ANY,
    VMADDR_CID_HOST,
    VMADDR_CID_HYPERVISOR,
    VMADDR_CID_LOCAL,
    VMADDR_PORT_ANY,
)
from .socket import PeerCredentials, socket

__all__ = [
    "AF_VSOCK",
    "MAX_DATAGRAM",
    "SO_VMCI_BUFFER_MAX_SIZE",
    "SO_VMCI_BUFFER_MIN_SIZE",
    "SO_VMCI_BUFFER_SIZE",
    "SO_VMCI_CONNECT_TIMEOUT",
    "SO_VMCI_PEER_HOST_VM_ID",
    "SO_VMCI_TRUSTED",
    "SO_VM_SOCKETS_BUFFER_MAX_SIZE",
    "SO_VM_SOCKETS_BUFFER_MIN_SIZE",
    "SO_VM_SOCKETS_BUFFER_SIZE",
    "SO_VM_SOCKETS_CONNECT_TIMEOUT",
    "SO_VM_SOCKETS_CONNECT_TIMEOUT_NEW",
    "SO_VM_SOCKETS_CONNECT_TIMEOUT_OLD",
    "SO_VM_SOCKETS_NONBLOCK_TXRX",
    "SO_VM_SOCKETS_PEER_HOST_VM_ID",
    "SO_VM_SOCKETS_TRUSTED",
    "VMADDR_CID_ANY",
    "VMADDR_CID_HOST",
    "VMADDR_CID_HYPERVISOR",
    "VMADDR_CID_LOCAL",
    "VMADDR_PORT_ANY",
    "Attachment",
    "PeerCredentials",
    "VMCISock_GetAFValue",
    "VMCISock_GetLocalCID",
    "attach",
    "create_connection",
    "create_server",
    "get_local_cid",
    "install",
    "open_connection",
    "socket",
    "socketpair",
    "start_server",
]
