"""Limits of the AMQP proxies, each with its reason."""

#: Longest frame in bytes: from the broker, where it is buffered until it is complete (eight times
#: RabbitMQ's default frame_max), and in a client's handshake (RabbitMQ requires at most 4096 bytes
#: there, newer versions 16,384 because of long OAuth tokens).
AMQP_FRAME_MAX_BYTES = 1 << 20
AMQP_HANDSHAKE_FRAME_MAX_BYTES = 16_384

#: Frames in a client's handshake: it needs four, one for each challenge of the broker, and
#: possibly a heartbeat.
AMQP_HANDSHAKE_FRAMES_MAX = 64

#: Time for a client's handshake, in seconds: the value of RabbitMQ's handshake_timeout.
AMQP_HANDSHAKE_TIMEOUT_SECONDS = 10.0

#: Time for a client to answer connection.close, and for a half-open connection, in seconds.
#: Clients close at once.
AMQP_CLOSE_TIMEOUT_SECONDS = 5.0

#: Sessions at the same time: of one proxy, and of one guest (four guests at their limit would
#: fill the proxy).  A guest that reads slowly costs AMQP_SESSION_WINDOW_BYTES and
#: AMQP_FRAME_MAX_BYTES bytes for each session.
AMQP_SESSIONS_MAX = 1024
AMQP_GUEST_SESSIONS_MAX = 256

#: Unacknowledged bytes of one session in each direction: 128 MB/s at a round-trip time of two
#: milliseconds.
AMQP_SESSION_WINDOW_BYTES = 262_144

#: Unsent bytes of a session, at each of its ends and in the HTTP/2 connection, above which reading
#: from the sender is paused.
AMQP_SESSION_UNSENT_MAX_BYTES = 131_072

#: Unacknowledged bytes of one HTTP/2 connection, enough between two window updates.
AMQP_UPLINK_WINDOW_BYTES = 16 << 20

#: Bytes of one HTTP/2 frame: one session delays the others by at most that much.
AMQP_UPLINK_FRAME_MAX_BYTES = 65_536

#: Bytes that the peer of an HTTP/2 connection has not read before the connection is aborted.
#: Flow control stops sessions' data long before; the rest are answers to the peer's requests.
AMQP_UPLINK_UNREAD_MAX_BYTES = 4 << 20

#: HTTP/2 frames of one connection handled in one turn of the loop: some milliseconds of small
#: frames.  Sessions' data arrives in a few large ones.
AMQP_UPLINK_FRAMES_PER_TURN_MAX = 64

#: Silence in seconds after which the peer of an HTTP/2 connection is probed (PING), and after
#: which an unanswered probe ends the connection.
AMQP_UPLINK_SILENCE_SECONDS = 10.0

#: First and longest pause before the host proxy reconnects, in seconds.
AMQP_RETRY_FIRST_PAUSE_SECONDS, AMQP_RETRY_LONGEST_PAUSE_SECONDS = 0.1, 5.0

#: Time for a new session to wait for the HTTP/2 connection and for the answer to its request, in
#: seconds.
AMQP_OPEN_TIMEOUT_SECONDS = 10.0

#: HTTP/2 connections of one AMQP proxy (one for each host) and sessions in all of them: each is a
#: descriptor.
AMQP_UPLINKS_MAX = 256
AMQP_PROXY_SESSIONS_MAX = 8192

#: Time for an AMQP proxy to connect to one node, in seconds.
AMQP_NODE_CONNECT_TIMEOUT_SECONDS = 5.0

#: Interval of health checks in seconds: for a node that is up, and for one that is down.  RabbitMQ
#: logs a line for each check.
AMQP_NODE_CHECK_SECONDS, AMQP_NODE_RECHECK_SECONDS = 10.0, 1.0
