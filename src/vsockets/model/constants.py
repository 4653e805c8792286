"""Constants that all implementations of vSockets share.

Sources: the guide (chapters 2 and 3), ``vsock(7)`` and Linux's
``include/uapi/linux/vm_sockets.h``.  The ``SO_VMCI_*`` names are VMware's, the
``SO_VM_SOCKETS_*`` names are Linux's; they are the same options.
"""

#: The address family.  It is 40 on all of Linux, also if this Python was compiled without
#: ``socket.AF_VSOCK``, as many stand-alone builds are.
AF_VSOCK = 40

#: Wildcards, which the fabric replaces with the context's own CID and an ephemeral port.
VMADDR_CID_ANY = 0xFFFF_FFFF
VMADDR_PORT_ANY = 0xFFFF_FFFF

VMADDR_CID_HYPERVISOR = 0  #: services of the hypervisor itself
VMADDR_CID_LOCAL = 1  #: the caller's own context (loopback)
VMADDR_CID_HOST = 2  #: the host, "even in a nested virtual machine" (guide page 11)

# Socket options, at level AF_VSOCK.
SO_VM_SOCKETS_BUFFER_SIZE = 0  #: bytes, unsigned 64 bit
SO_VM_SOCKETS_BUFFER_MIN_SIZE = 1  #: bytes, unsigned 64 bit
SO_VM_SOCKETS_BUFFER_MAX_SIZE = 2  #: bytes, unsigned 64 bit
SO_VM_SOCKETS_PEER_HOST_VM_ID = 3  #: read only: the peer's virtual machine
SO_VM_SOCKETS_TRUSTED = 5  #: read only: 1 when this endpoint is trusted (guide page 24)
SO_VM_SOCKETS_CONNECT_TIMEOUT_OLD = 6  #: ``struct timeval``
SO_VM_SOCKETS_NONBLOCK_TXRX = 7  #: for kernel code only
SO_VM_SOCKETS_CONNECT_TIMEOUT_NEW = 8  #: ``struct __kernel_sock_timeval``
SO_VM_SOCKETS_CONNECT_TIMEOUT = SO_VM_SOCKETS_CONNECT_TIMEOUT_NEW

SO_VMCI_BUFFER_SIZE = SO_VM_SOCKETS_BUFFER_SIZE
SO_VMCI_BUFFER_MIN_SIZE = SO_VM_SOCKETS_BUFFER_MIN_SIZE
SO_VMCI_BUFFER_MAX_SIZE = SO_VM_SOCKETS_BUFFER_MAX_SIZE
SO_VMCI_PEER_HOST_VM_ID = SO_VM_SOCKETS_PEER_HOST_VM_ID
SO_VMCI_TRUSTED = SO_VM_SOCKETS_TRUSTED
SO_VMCI_CONNECT_TIMEOUT = SO_VM_SOCKETS_CONNECT_TIMEOUT_OLD

#: The largest port that needs CAP_NET_BIND_SERVICE (guide page 24).
LAST_RESERVED_PORT = 1023
