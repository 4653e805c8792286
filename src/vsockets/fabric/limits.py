"""Limits of contexts and ports, each with its reason."""

#: Consecutive ports to try for a free one, as Linux does (MAX_PORT_RETRIES): a program that holds
#: very many ports does not make another program's search long.
EPHEMERAL_PORT_TRIES_MAX = 24

#: Simultaneous sockets.  Each takes one or two descriptors of vsockd, which may have hundreds of
#: thousands, or 4096 where vsockd cannot raise its limit: see DAEMON_DESCRIPTOR_RESERVE.
GUEST_SOCKETS_MAX = 4096

#: Connections requested and not yet accepted: four such parties share a full backlog
#: (LISTEN_BACKLOG_MAX), so a single party cannot fill a listener's backlog.
GUEST_PENDING_CONNECTS_MAX = 1024

#: Users of the host to remember although they have no sockets: their request rates are counted.
HOST_USERS_REMEMBERED_MAX = 1024

#: Requests per second: connects, binds, new datagram destinations.  A connect takes vsockd about
#: 100 microseconds, so no client reaches this rate with connects; the limit stops floods of
#: cheaper requests, those that are refused.
GUEST_REQUESTS_PER_SECOND = 20_000

#: Bytes of unread datagrams sent by a guest: memory of the host's kernel.  64 MiB holds more than
#: 900 of the largest datagrams.
GUEST_DATAGRAM_MAX_BYTES = 64 << 20

#: Denials logged per second and context; the rest are counted.  A person reads fewer, and a guest
#: must not fill the host's disk.
AUDIT_LINES_PER_SECOND = 20
