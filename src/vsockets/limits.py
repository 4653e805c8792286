"""Every limit of the product in one place, each with its reason."""

#: A VMCI datagram is at most 17 pages, its 24-byte header included; what is
#: left is the largest payload a datagram vSocket carries (EMSGSIZE above it).
MAX_DATAGRAM = 17 * 4096 - 24

#: Buffer sizes of the guide, page 14, in bytes.
DEFAULT_BUFFER_SIZE = 65_536
DEFAULT_BUFFER_MIN_SIZE = 128
DEFAULT_BUFFER_MAX_SIZE = 262_144

#: What is asked of the kernel at most as a socket's buffer, in bytes.  It doubles the number,
#: as a signed 32-bit integer, and cuts it to net.core.wmem_max in any case.
LARGEST_SEND_BUFFER = 1 << 30

#: Connections that wait for one listener, at most (net.core.somaxconn).
MAX_BACKLOG = 4096

#: How long one system call may hold vsockd up, in seconds.  Only closing what somebody else
#: sent can take longer; a signal ends that.
SLOW_CALL = 0.02

#: How long connect() waits for the other side, in seconds (as Linux does).
CONNECT_TIMEOUT = 2.0

#: How long a program waits for vsockd to answer anything else, in seconds.
#: vsockd answers in microseconds; only a stopped or dead one takes longer.
REQUEST_TIMEOUT = 10.0

#: How long vsockd lets a client hold a connection on which it says nothing, in
#: seconds.  The library's request is in the socket before vsockd looks.
SILENT_CLIENT = 10.0

#: Connections waiting in vsockd's own door: what Linux allows by default
#: (net.core.somaxconn).
CONTROL_BACKLOG = 4096

#: Datagram destinations one socket keeps open.  Each is a descriptor in the
#: program and one in vsockd; a service that answers more peers than this
#: pays one request to vsockd when a forgotten peer comes back.
DATAGRAM_ROUTES = 256

#: Bytes of one request on the administrator's socket: far above any of them.
CONTROL_REQUEST = 65_536

#: Sockets of supervised programs, theirs and ours, that a supervisor remembers.
#: vsockd can be asked about a forgotten one; each takes half a kilobyte.
SUPERVISED_SOCKETS = 65_536

#: How long a non-blocking connect() of a supervised program may take before the
#: program is told that it is in progress, in seconds.  vsockd answers in a tenth
#: of a millisecond; this is for when the machine is busy.
CONNECT_GRACE = 0.02

#: Datagram routes of supervised programs that a supervisor keeps: each is a descriptor
#: of its process, of which a user may have 1024 by default.
SUPERVISED_ROUTES = 512

#: A send buffer above net.core.wmem_max, in bytes, up to which a privileged supervisor
#: does what its program asks for; the kernel's own AF_VSOCK has no limit at all.
FORCED_SEND_BUFFER = 4 << 20
