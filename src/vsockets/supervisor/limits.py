"""Limits of the supervisor of ``vsock run``, each with its reason."""

#: Sockets of supervised programs, theirs and ours, that a supervisor remembers.
#: vsockd can be asked about a forgotten one; each takes half a kilobyte.
SUPERVISOR_SOCKETS_MAX = 65_536

#: How long a non-blocking connect() of a supervised program may take before the
#: program is told that it is in progress, in seconds.  vsockd answers in a tenth
#: of a millisecond; this is for when the machine is busy.  A program that is told
#: at once needs no second call, and hears at once that it has no port.
SUPERVISOR_CONNECT_GRACE_SECONDS = 0.25

#: How often a supervisor looks whether a thread it has an answer for has taken its signals, and
#: how long it waits for that, in seconds.  A thread takes them at once, unless it gets no
#: processor, or they come faster than it can take them.
SUPERVISOR_SIGNAL_POLL_SECONDS, SUPERVISOR_SIGNAL_WAIT_SECONDS = 0.001, 1.0

#: How soon a supervisor tries again to reach a vsockd whose backlog is full, in seconds: only
#: a stopped one lets 4096 connections wait.
SUPERVISOR_RECONNECT_SECONDS = 0.05

#: Datagram routes of supervised programs that a supervisor keeps: each is a descriptor
#: of its process, of which a user may have 1024 by default.
SUPERVISOR_ROUTES_MAX = 512

#: A send buffer above net.core.wmem_max, in bytes, up to which a privileged supervisor
#: does what its program asks for; the kernel's own AF_VSOCK has no limit at all.
SUPERVISOR_FORCED_SEND_BUFFER_MAX_BYTES = 4 << 20
