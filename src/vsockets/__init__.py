"""vSockets for any hypervisor and for none.

``vsockets.socket`` is a drop-in for ``socket.socket`` with AF_VSOCK.  See README.md.
"""

from . import transports as _transports
from .attachment import Attachment
from .constants import *  # noqa: F403
from .functions import (
    VMCISock_GetAFValue,
    VMCISock_GetLocalCID,
    attach,
    create_connection,
    create_server,
    get_local_cid,
    socketpair,
)
from .install import install
from .limits import MAX_DATAGRAM
from .socket import PeerCredentials, socket
from .streams import open_connection, start_server
