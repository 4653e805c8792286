"""Limits of vsockd, each with its reason."""

#: How long one system call may hold vsockd up, in seconds.  Only closing what somebody else
#: sent can take longer; a signal ends that.
DAEMON_SLOW_CALL_SECONDS = 0.005

#: Descriptors of one party that wait to be closed, because they were sent to vsockd and should not
#: have been: each takes as long to close as its sender likes.
DAEMON_UNWANTED_DESCRIPTORS_MAX = 16

#: How long vsockd lets a client hold a connection on which it says nothing, in
#: seconds.  The library's request is in the socket before vsockd looks.
DAEMON_SILENT_CLIENT_SECONDS = 10.0

#: What is served of one party in a turn of vsockd's loop, besides a new connection at each control
#: socket: requests, which take some 40 microseconds each, and connections that have ended; and the
#: parties whose turn it is.  So who has thousands of requests waiting keeps others waiting for less
#: than a millisecond.
DAEMON_REQUESTS_PER_TURN_MAX = 16
DAEMON_ENDS_PER_TURN_MAX = 64
DAEMON_PARTIES_PER_TURN_MAX = 64

#: Answers of vsockd that wait for one client to read them.  Programs read one before they ask
#: again; each is memory of the host's kernel.
DAEMON_UNREAD_REPLIES_MAX = 4

#: How soon vsockd tries again to announce a connection that could not be announced, in seconds.
DAEMON_ANNOUNCE_RETRY_SECONDS = 0.02

#: How soon vsockd looks again for a stream that must end and was in no process it could look
#: into, in seconds: a guest's users expect its end within 100 ms.  Then half as often each
#: time, down to the second number.
DISCONNECT_RETRY_SECONDS = 0.01
DISCONNECT_LONGEST_RETRY_SECONDS = 1.0

#: How long vsockd looks for streams that must end before it serves others in between, in seconds.
#: It takes a few milliseconds for a hundred of them, unless there are very many processes and
#: descriptors.
DISCONNECT_AT_ONCE_SECONDS = 0.1

#: How soon vsockd looks whether sockets that it reaches by a name have been closed, in seconds, and
#: then half as often each time, down to the second number.  Whoever asks for their ports, or
#: connects to them, need not wait for that.
DAEMON_SWEEP_FIRST_SECONDS = 1.0
DAEMON_SWEEP_LONGEST_SECONDS = 10.0

#: How often what guests hold is counted anew for one that has reached a limit, in seconds at
#: least: counting costs about as much as a hundred requests.
LIMIT_RECOUNT_SECONDS = 0.05

#: Datagram sockets of a party that vsockd looks at for each new one of it, whether they are open:
#: then those that are not are half as many as the others at most.
DAEMON_PROBES_PER_BIND = 3

#: Sockets with names that are looked at in one go: some 200 microseconds.
DAEMON_PROBES_PER_STEP = 64

#: Streams that are watched together: a look at one costs a look at all of these, some 150
#: microseconds. Each group is two descriptors; with very many streams groups become larger instead
#: of more.
DAEMON_STREAMS_PER_GROUP = 128
DAEMON_STREAM_GROUPS_MAX = 512

#: How often a party may have vsockd find out whether one stream has ended, a second.
DAEMON_PROBES_PER_SECOND = 200

#: How often vsockd looks at how much a guest with many datagram routes has on its way, in
#: seconds: what a guest sends too much in that time, the host's memory can bear.
DATAGRAM_QUOTA_CHECK_SECONDS = 0.25

#: Events that wait for a subscriber who does not read, in bytes; later ones are counted.
EVENTS_UNREAD_MAX_BYTES = 262_144

#: Connections waiting in vsockd's own door: what Linux allows by default
#: (net.core.somaxconn).
CONTROL_BACKLOG_MAX = 4096

#: Bytes of one request on the administrator's socket: far above any of them.
CONTROL_REQUEST_MAX_BYTES = 65_536

#: Descriptors that vsockd keeps free, of those it may have, or a quarter if that is less: for
#: requests that end at once, which need no more than a few at a time, whatever clients hold.
DAEMON_DESCRIPTOR_RESERVE = 1024

#: Bytes that wait for who captures at a device and is slow; what comes then is counted.  Some
#: hundredths of a second of all a device can carry.
CAPTURE_BUFFER_MAX_BYTES = 4 << 20
