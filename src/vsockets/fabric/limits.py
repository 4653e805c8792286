"""Limits of contexts and ports, each with its reason."""

#: Ports in a row that are looked at for a free one, as by Linux (MAX_PORT_RETRIES): a program that
#: holds very many makes no other one's search long.
EPHEMERAL_PORT_TRIES_MAX = 24

#: Sockets at the same time.  Each is one or two descriptors in vsockd, which may have hundreds of
#: thousands, or where it may not raise its limit as few as 4096: see DAEMON_DESCRIPTOR_RESERVE.
GUEST_SOCKETS_MAX = 4096

#: Connections that were asked for and not yet accepted: a full backlog (LISTEN_BACKLOG_MAX) is
#: shared by four such parties, so none alone can fill a listener's.
GUEST_PENDING_CONNECTS_MAX = 1024

#: Users of the host that vsockd remembers although they have nothing: how often they ask counts.
HOST_USERS_REMEMBERED_MAX = 1024

#: Requests a second: connects, binds, new datagram destinations.  A connect
#: takes vsockd about 100 microseconds, so nobody is served that many; it is for floods of
#: requests that cost less, those that are refused.
GUEST_REQUESTS_PER_SECOND = 20_000

#: Bytes of datagrams on their way from a guest: memory of the host's kernel.  64 MiB is
#: more than 900 of the largest.
GUEST_DATAGRAM_MAX_BYTES = 64 << 20

#: Denials that are logged a second, for each context; the rest are counted.  A person reads
#: less, and a guest must not fill the host's disk.
AUDIT_LINES_PER_SECOND = 20
