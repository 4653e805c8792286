"""Limits of the supervisor of ``vsock run``, each with its reason."""

#: Sockets, vSockets or not, whose state a supervisor keeps, half a kilobyte each.  The state of a
#: dropped one is recovered from vsockd.
SUPERVISOR_SOCKETS_MAX = 65_536

#: Seconds until a non-blocking connect() of a supervised program fails with EINPROGRESS before
#: vsockd has replied.  A reply takes a tenth of a millisecond, more on a busy machine.  With the
#: reply, the program gets errors such as EADDRNOTAVAIL from connect() itself.
SUPERVISOR_CONNECT_GRACE_SECONDS = 0.25

#: Seconds between two checks whether a thread, before it gets an answer, has handled its pending
#: signals, and seconds until it gets the answer in any case.  A thread handles them at once, unless
#: it gets no processor, or signals arrive faster than it can handle them.
SUPERVISOR_SIGNAL_POLL_SECONDS, SUPERVISOR_SIGNAL_WAIT_SECONDS = 0.001, 1.0

#: Seconds that the supervisor blocks until vsockd has replied to a connect.  A registration with an
#: epoll, which lets it serve other calls meanwhile, costs more than a reply takes.
SUPERVISOR_REPLY_GRACE_SECONDS = 0.001

#: Seconds in which the supervisor does not block again after a reply that came later: vsockd waits
#: for a processor, or has been stopped.  So other calls wait for a tenth of the time at most.
SUPERVISOR_LATE_REPLY_SECONDS = 0.01

#: Seconds between two attempts to connect to a vsockd whose backlog is full: only a stopped vsockd
#: leaves 4096 connections pending.
SUPERVISOR_RECONNECT_SECONDS = 0.05

#: Datagram routes that a supervisor keeps for its programs: each is a descriptor of its process,
#: which may have 1024 by default.
SUPERVISOR_ROUTES_MAX = 512

#: The largest send buffer above net.core.wmem_max, in bytes, that a privileged supervisor sets for
#: its program; the kernel's own AF_VSOCK has no limit at all.
SUPERVISOR_FORCED_SEND_BUFFER_MAX_BYTES = 4 << 20
