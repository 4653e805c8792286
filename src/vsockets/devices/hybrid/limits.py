"""Limits of hybrid-vsock devices, each with its reason."""

#: Connections of one hybrid-vsock device, pending ones included.  Firecracker allows its guest
#: 1023; each takes two descriptors, and four more while a reader is slow.
HYBRID_CONNECTIONS_MAX = 1024

#: Host ports of one hybrid-vsock device: each takes a descriptor and a file.
HYBRID_PORTS_MAX = 4096

#: Time for a guest to accept a connect, in seconds.  A client has its own timeout, two seconds by
#: default; this bounds clients without one, or with a longer one.
HYBRID_CONNECT_TIMEOUT_SECONDS = 10.0

#: Interval between attempts to reach a guest that does not listen yet, in seconds.
HYBRID_RETRY_SECONDS = 0.05
