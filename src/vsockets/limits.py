"""Limits that several packages share, each with its reason.  The others are in their packages."""

#: Bytes of a datagram's payload (EMSGSIZE above): a VMCI datagram has at most 17 pages, of which 24
#: bytes are its header.
MAX_DATAGRAM = 17 * 4096 - 24

#: Buffer sizes of VMware's guide, page 14, in bytes.
STREAM_BUFFER_DEFAULT_BYTES = 65_536
STREAM_BUFFER_MIN_BYTES = 128
STREAM_BUFFER_MAX_BYTES = 262_144

#: Bytes of a socket's send buffer requested from the kernel: it doubles the value, as a signed
#: 32-bit integer, and limits it to net.core.wmem_max.
SEND_BUFFER_MAX_BYTES = 1 << 30

#: Connections of one listener that are not yet accepted (net.core.somaxconn).
LISTEN_BACKLOG_MAX = 4096

#: Threads that close descriptors received from peers.  A close can block for as long as the sender
#: chooses, so another thread is started whenever all are busy.
DESCRIPTOR_CLOSE_THREADS_MAX = 16

#: Default timeout of connect() in seconds, as on Linux.
CONNECT_TIMEOUT_SECONDS = 2.0

#: Longest connect timeout that a program may set, in seconds: the limit of Linux
#: (MAX_SCHEDULE_TIMEOUT) with its highest clock rate, 1000 ticks per second.
CONNECT_TIMEOUT_MAX_SECONDS = ((1 << 63) - 1) // 1000 - 2

#: Timeout of other requests to vsockd, in seconds.  vsockd replies in microseconds unless it is
#: stopped.
VSOCKD_REPLY_TIMEOUT_SECONDS = 10.0

#: Datagram routes that one socket keeps open.  Each takes a descriptor in the program and one in
#: vsockd; a service with more peers makes one request to vsockd for a peer whose route was closed.
DATAGRAM_ROUTES_MAX = 256

#: Bytes of a .vmx file.  VMware writes a few thousand, and 40,000 with every option set; a larger
#: file is a disk image that was named by mistake.
VMX_FILE_MAX_BYTES = 1 << 20

#: Lines logged per second for each party that causes them (vsockets.logs), and parties that are
#: remembered.
LOG_LINES_PER_SECOND = 20
LOG_PARTIES_MAX = 1024

#: Bytes of the log of a vsockd started in the background, and of the previous log.  Most state
#: folders are in memory.
LOG_FILE_MAX_BYTES = 1 << 20

#: Bytes of one configuration file: about ten thousand guests.
CONFIGURATION_FILE_MAX_BYTES = 1 << 20

#: Characters of the name of a guest or of a domain: VMware's limit for a virtual machine.
NAME_MAX_CHARACTERS = 80

#: Bytes of a line of the hybrid vsock handshake: ``CONNECT`` and a port have 19, and Firecracker
#: reads no more than these.
HYBRID_LINE_MAX_BYTES = 32

#: Bytes of the name of a hybrid vsock's unix socket.  A socket's path has at most 107 bytes, of
#: which the folder's descriptor (``/proc/self/fd/…``), ``_`` and a port take the rest.
HYBRID_PATH_MAX_BYTES = 76

#: Bytes of the pipe for one direction of a forwarded stream, and so the most that is in transit.  A
#: larger pipe gains nothing, as measured on this project's machine.
SPLICE_PIPE_BYTES = 256 * 1024

#: Empty pipes kept for reuse.  A direction needs a pipe only during a call, or while its sink is
#: full; so this many sinks can be slow before new pipes are created.
SPLICE_SPARE_PIPES_MAX = 64

#: Bytes moved in one direction before another one is served: a few milliseconds at most.
SPLICE_TURN_MAX_BYTES = 4 << 20

#: First and longest pause before an unavailable target is retried, in seconds.
RETRY_FIRST_PAUSE_SECONDS, RETRY_LONGEST_PAUSE_SECONDS = 0.01, 0.5

#: Connections or datagrams received from one socket before another one is served.
ACCEPTS_PER_TURN_MAX = 64

#: Bytes of one payload in a capture: what the forwarder reads at once, and less than the limit of
#: Wireshark (262,144).
CAPTURE_PAYLOAD_MAX_BYTES = 65_536

#: Starts of vsockd within a minute, after it was killed or has crashed, unless ``--restarts`` has
#: another number: what makes it crash may be in what it restores.
DAEMON_RESTARTS_DEFAULT = 0
