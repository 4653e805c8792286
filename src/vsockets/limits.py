"""Limits that several packages share, each with its reason; the others are beside their
packages."""

#: A VMCI datagram is at most 17 pages, its 24-byte header included; what is
#: left is the largest payload a datagram vSocket carries (EMSGSIZE above it).
MAX_DATAGRAM = 17 * 4096 - 24

#: Buffer sizes of the guide, page 14, in bytes.
STREAM_BUFFER_DEFAULT_BYTES = 65_536
STREAM_BUFFER_MIN_BYTES = 128
STREAM_BUFFER_MAX_BYTES = 262_144

#: What is asked of the kernel at most as a socket's buffer, in bytes.  It doubles the number,
#: as a signed 32-bit integer, and cuts it to net.core.wmem_max in any case.
SEND_BUFFER_MAX_BYTES = 1 << 30

#: Connections that wait for one listener, at most (net.core.somaxconn).
LISTEN_BACKLOG_MAX = 4096

#: Threads that close descriptors which peers have sent.  A close can block for as long as the
#: sender likes, so another thread begins whenever all are busy.
DESCRIPTOR_CLOSE_THREADS_MAX = 16

#: How long connect() waits for the other side, in seconds (as Linux does).
CONNECT_TIMEOUT_SECONDS = 2.0

#: The longest connect timeout that a program may set, in seconds: what Linux takes
#: (MAX_SCHEDULE_TIMEOUT) where its clock has the most ticks in a second, 1000.
CONNECT_TIMEOUT_MAX_SECONDS = ((1 << 63) - 1) // 1000 - 2

#: How long a program waits for vsockd to answer anything else, in seconds.
#: vsockd answers in microseconds; only a stopped or dead one takes longer.
VSOCKD_REPLY_TIMEOUT_SECONDS = 10.0

#: Datagram destinations one socket keeps open.  Each is a descriptor in the
#: program and one in vsockd; a service that answers more peers than this
#: pays one request to vsockd when a forgotten peer comes back.
DATAGRAM_ROUTES_MAX = 256

#: Bytes of a .vmx file.  VMware writes some thousands, 40,000 with every option set; what is
#: larger is a disk image named by mistake.
VMX_FILE_MAX_BYTES = 1 << 20

#: Lines that a program logs a second for each party that causes them (vsockets.logs), and parties
#: that are remembered.
LOG_LINES_PER_SECOND = 20
LOG_PARTIES_MAX = 1024

#: Bytes of the log of a vsockd that was started in the background, and as many of the one before:
#: it lies in memory, in most state folders.
LOG_FILE_MAX_BYTES = 1 << 20

#: Bytes of one configuration file: some ten thousand guests.
CONFIGURATION_FILE_MAX_BYTES = 1 << 20

#: Characters of the name of a guest or of a domain: what VMware allows a virtual machine.
NAME_MAX_CHARACTERS = 80

#: Bytes of a line of the handshake: ``CONNECT`` and a port have 19, and Firecracker reads no more
#: than these.
HYBRID_LINE_MAX_BYTES = 32

#: Bytes of the name of a unix socket with ports beside it: ``_`` and a port come after it, and a
#: folder's descriptor (``/proc/self/fd/…``) before, and a socket's path has 107.
HYBRID_PATH_MAX_BYTES = 76

#: Bytes of the pipe that one direction of a forwarded stream moves through, and so the most
#: that is on its way in it.  Measured on this project's machine, splice gains nothing above.
SPLICE_PIPE_BYTES = 256 * 1024

#: Empty pipes that are kept for the next who needs one.  A pipe is needed only while its sink
#: is full, or within one call; so this many sinks can be slow before pipes are made anew.
SPLICE_SPARE_PIPES_MAX = 64

#: Bytes of one direction before it is another's turn: a few milliseconds at most.
SPLICE_TURN_MAX_BYTES = 4 << 20

#: First and longest pause before a target that is not there yet is tried again, in seconds.
RETRY_FIRST_PAUSE_SECONDS, RETRY_LONGEST_PAUSE_SECONDS = 0.01, 0.5

#: Connections or datagrams that are taken from one socket before it is another's turn.
ACCEPTS_PER_TURN_MAX = 64

#: Bytes of one payload in a capture, at most: what the forwarder reads at a time, and less than
#: Wireshark takes (262,144).
CAPTURE_PAYLOAD_MAX_BYTES = 65_536
