"""Limits of hybrid vsock devices, each with its reason."""

#: Connections through one hybrid-vsock device, established or not.  Firecracker allows its guest
#: 1023; each is two descriptors, and four more while a reader is slow.
HYBRID_CONNECTIONS_MAX = 1024

#: Ports of the host that a hybrid-vsock device offers its guest: each is a descriptor and a file.
HYBRID_PORTS_MAX = 4096

#: How long a guest may take to accept through hybrid vsock, in seconds.  Who connects has a
#: timeout of his own, two seconds by default; this is for those who have none, or a longer one.
HYBRID_CONNECT_TIMEOUT_SECONDS = 10.0

#: How soon a hybrid-vsock device tries again to reach a guest that is waited for, in seconds.
HYBRID_RETRY_SECONDS = 0.05
