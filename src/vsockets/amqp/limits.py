"""Every limit of the proxies for AMQP, each with its reason."""

#: Bytes of a frame from the broker that is held until it is whole: eight times what RabbitMQ
#: sends by default (frame_max).  And of one in a client's handshake, which RabbitMQ wants to have
#: 4096 at most, and newer ones 16,384 because of long OAuth tokens.
AMQP_FRAME_MAX_BYTES = 1 << 20
AMQP_HANDSHAKE_FRAME_MAX_BYTES = 16_384

#: Frames of a client's handshake: it has four, one for each challenge of the broker's, and perhaps
#: a heartbeat.
AMQP_HANDSHAKE_FRAMES_MAX = 64

#: How long a client's handshake may take, in seconds: what RabbitMQ allows (handshake_timeout).
AMQP_HANDSHAKE_TIMEOUT_SECONDS = 10.0

#: How long a client may take to agree that its connection is closed, in seconds; and how long a
#: connection may stay half open.  Clients do it at once.
AMQP_CLOSE_TIMEOUT_SECONDS = 5.0

#: Sessions at the same time: of one proxy, and of one guest, so that four of them cannot shut
#: the others out.  A session holds AMQP_SESSION_WINDOW_BYTES and AMQP_FRAME_MAX_BYTES bytes for a
#: guest that reads slowly.
AMQP_SESSIONS_MAX = 1024
AMQP_GUEST_SESSIONS_MAX = 256

#: Bytes of one session that are on their way and not taken yet, in either direction: with two
#: milliseconds' round trip that is 128 MB/s.
AMQP_SESSION_WINDOW_BYTES = 262_144

#: Bytes of a session that wait for room before no more is taken from its sender, at each of its
#: ends and in the link.
AMQP_SESSION_UNSENT_MAX_BYTES = 131_072

#: Bytes on their way in one link: all that is needed between two of its acknowledgements.
AMQP_UPLINK_WINDOW_BYTES = 16 << 20

#: Bytes of one HTTP/2 frame: the longest that one session keeps the others waiting.
AMQP_UPLINK_FRAME_MAX_BYTES = 65_536

#: Bytes that the far end of a link has not read, before it is given up.  Sessions' data is held
#: back long before; what is left are answers to what it asks.
AMQP_UPLINK_UNREAD_MAX_BYTES = 4 << 20

#: HTTP/2 frames of one link that are looked at before it is the others' turn: some milliseconds, of
#: small ones.  Sessions' data comes in a few large ones.
AMQP_UPLINK_FRAMES_PER_TURN_MAX = 64

#: After how long a silent link is asked whether it is there, and then given up, in seconds.
AMQP_UPLINK_SILENCE_SECONDS = 10.0

#: First and longest pause before a broken link is made again, in seconds.
AMQP_RETRY_FIRST_PAUSE_SECONDS, AMQP_RETRY_LONGEST_PAUSE_SECONDS = 0.1, 5.0

#: How long a new session waits for a link, and for the far end's answer, in seconds.
AMQP_OPEN_TIMEOUT_SECONDS = 10.0

#: Links of one AMQP proxy, one for each host, and sessions of all of them: each is a descriptor.
AMQP_UPLINKS_MAX = 256
AMQP_PROXY_SESSIONS_MAX = 8192

#: How long an AMQP proxy tries to reach one node, in seconds.
AMQP_NODE_CONNECT_TIMEOUT_SECONDS = 5.0

#: How often a node is asked whether it serves, in seconds: one that does, and one that did not.
#: RabbitMQ writes a line to its log for each.
AMQP_NODE_CHECK_SECONDS, AMQP_NODE_RECHECK_SECONDS = 10.0, 1.0
