"""Limits of vsockd, each with its reason."""

#: Seconds that one system call may block vsockd.  Only closing a socket that a client sent can
#: take longer; a signal ends that.
DAEMON_SLOW_CALL_SECONDS = 0.005

#: A call that takes longer than the first number of seconds was blocked by closing what a party has
#: sent.  The party's next request is served after a pause: the duration of the call times the
#: second number, and at most the third in seconds (vsockd itself may have been stopped during the
#: call).  So these calls of one party take at most a tenth of vsockd's time.
DAEMON_NOTICED_CALL_SECONDS = 0.001
DAEMON_PAUSE_FACTOR = 10
DAEMON_PAUSE_MAX_SECONDS = 1.0

#: Descriptors of one party that wait to be closed because they were sent to vsockd without reason.
#: The sender determines how long closing each of them takes.
DAEMON_UNWANTED_DESCRIPTORS_MAX = 16

#: Seconds that a client may keep a connection without a request.  The library's request is in the
#: socket before vsockd looks.
DAEMON_SILENT_CLIENT_SECONDS = 10.0

#: Served per party and turn of vsockd's loop, apart from one new connection per control socket:
#: requests, which take some 40 microseconds each, and closed connections; and parties per turn.  A
#: client with thousands of waiting requests thus delays others by less than a millisecond.
DAEMON_REQUESTS_PER_TURN_MAX = 16
DAEMON_ENDS_PER_TURN_MAX = 64
DAEMON_PARTIES_PER_TURN_MAX = 64

#: Unread replies to one client.  Programs read a reply before the next request; each reply is
#: memory of the host's kernel.
DAEMON_UNREAD_REPLIES_MAX = 4

#: Seconds until vsockd tries again to announce a connection that could not be announced.
DAEMON_ANNOUNCE_RETRY_SECONDS = 0.02

#: Seconds until vsockd searches again for a stream that must end and was found in no process that
#: vsockd may look into: users expect a guest's streams to end within 100 ms.  The interval doubles
#: with each attempt, up to the second number.
DISCONNECT_RETRY_SECONDS = 0.01
DISCONNECT_LONGEST_RETRY_SECONDS = 1.0

#: Seconds that vsockd searches for streams that must end before it serves other requests in
#: between.  A hundred streams take a few milliseconds, unless there are very many processes and
#: descriptors.
DISCONNECT_AT_ONCE_SECONDS = 0.1

#: Seconds that vsockd waits, in all, for other processes to close streams that it may not close
#: itself.  Each takes about a millisecond, or 100 ms if it cannot be stopped.
DISCONNECT_WAIT_SECONDS = 0.2

#: Seconds that vsockd searches for datagram sockets that must end, when it stops, and after a crash
#: before it serves.  A thousand processes take some milliseconds; very many descriptors take
#: longer.
DATAGRAM_END_AT_ONCE_SECONDS = 1.0

#: Seconds until vsockd probes whether named sockets have been closed.  The interval doubles with
#: each probe, up to the second number.  Requests for their ports, and connects to them, do not
#: wait for that.
DAEMON_SWEEP_FIRST_SECONDS = 1.0
DAEMON_SWEEP_LONGEST_SECONDS = 10.0

#: Least seconds between recounts of a guest that has reached a limit: a recount costs about as much
#: as a hundred requests.
LIMIT_RECOUNT_SECONDS = 0.05

#: Datagram sockets of a party to probe for each new one: closed ones then number at most half as
#: many as the open ones.
DAEMON_PROBES_PER_BIND = 3

#: Named sockets to probe in one step: some 200 microseconds.
DAEMON_PROBES_PER_STEP = 64

#: Streams in one epoll: checking one stream costs a check of all of them, some 150 microseconds.
#: Each group takes two descriptors; with very many streams the groups grow instead of their
#: number.
DAEMON_STREAMS_PER_GROUP = 128
DAEMON_STREAM_GROUPS_MAX = 512

#: Checks per second and party whether one stream has ended.
DAEMON_PROBES_PER_SECOND = 200

#: Seconds between checks of the unread bytes of a guest with many datagram routes.  The host's
#: memory can bear what a guest sends in excess in that time.
DATAGRAM_QUOTA_CHECK_SECONDS = 0.25

#: Unread bytes of events for one subscriber; later events are counted instead.
EVENTS_UNREAD_MAX_BYTES = 262_144

#: Backlog of vsockd's own listening sockets: Linux's default maximum (net.core.somaxconn).
CONTROL_BACKLOG_MAX = 4096

#: Bytes of one request on the administrator's socket: far more than any request has.
CONTROL_REQUEST_MAX_BYTES = 65_536

#: Seconds of processor time in which an administrator's report is continued, while other clients
#: wait, and rows in one answer: a row has some 350 bytes, so that an answer fits
#: IN_FLIGHT_MAX_BYTES, and is not sent twice when vsockd is killed.
CONTROL_REPORT_STEP_SECONDS = 0.001
CONTROL_REPORT_PART_ROWS = 32

#: Bytes that the entries of vsockd's journal may take before a new one is begun, and twice those of
#: its beginning on top: so beginning one takes a small part of vsockd's time.
DAEMON_JOURNAL_LEAST_BYTES = 4 << 20

#: Seconds in which vsockd is started again at most ``--restarts`` times (DAEMON_RESTARTS_DEFAULT).
DAEMON_RESTARTS_SECONDS = 60.0

#: Descriptors that vsockd keeps free, or a quarter of its limit if that is less: for requests that
#: complete at once, which need only a few at a time.
DAEMON_DESCRIPTOR_RESERVE = 1024

#: Unread bytes for a slow client that captures at a device; later records are counted instead.
#: Some hundredths of a second of a device's full throughput.
CAPTURE_BUFFER_MAX_BYTES = 4 << 20
