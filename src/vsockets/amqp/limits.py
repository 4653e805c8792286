"""Every limit of the proxies for AMQP, each with its reason."""

#: Bytes of a frame from the broker that is held until it is whole: eight times what RabbitMQ
#: sends by default (frame_max).  And of one in a client's handshake, which RabbitMQ wants to have
#: 4096 at most, and newer ones 16,384 because of long OAuth tokens.
AMQP_FRAME = 1 << 20
AMQP_HANDSHAKE_FRAME = 16_384

#: Frames of a client's handshake: it has four, one for each challenge of the broker's, and perhaps
#: a heartbeat.
AMQP_HANDSHAKE_FRAMES = 64

#: How long a client's handshake may take, in seconds: what RabbitMQ allows (handshake_timeout).
AMQP_HANDSHAKE = 10.0

#: How long a client may take to agree that its connection is closed, in seconds; and how long a
#: connection may stay half open.  Clients do it at once.
AMQP_CLOSE_OK = 5.0

#: Sessions at the same time: of one proxy, and of one guest, so that four of them cannot shut
#: the others out.  A session holds AMQP_WINDOW and AMQP_FRAME bytes for a guest that reads slowly.
AMQP_SESSIONS = 1024
AMQP_GUEST_SESSIONS = 256

#: Bytes of one session that are on their way and not taken yet, in either direction: with two
#: milliseconds' round trip that is 128 MB/s.
AMQP_WINDOW = 262_144

#: Bytes of a session that wait for room before no more is taken from its sender, at each of its
#: ends and in the link.
AMQP_UNSENT = 131_072

#: Bytes on their way in one link: all that is needed between two of its acknowledgements.
AMQP_LINK_WINDOW = 16 << 20

#: Bytes of one HTTP/2 frame: the longest that one session keeps the others waiting.
AMQP_LINK_FRAME = 65_536

#: Bytes that the far end of a link has not read, before it is given up.  Sessions' data is held
#: back long before; what is left are answers to what it asks.
AMQP_LINK_UNREAD = 4 << 20

#: HTTP/2 frames of one link that are looked at before it is the others' turn: some milliseconds, of
#: small ones.  Sessions' data comes in a few large ones.
AMQP_LINK_FRAMES = 64

#: After how long a silent link is asked whether it is there, and then given up, in seconds.
AMQP_LINK_SILENCE = 10.0

#: First and longest pause before a broken link is made again, in seconds.
AMQP_FIRST_PAUSE, AMQP_LONGEST_PAUSE = 0.1, 5.0

#: How long a new session waits for a link, and for the far end's answer, in seconds.
AMQP_OPEN = 10.0

#: Links of one AMQP proxy, one for each host, and sessions of all of them: each is a descriptor.
AMQP_LINKS = 256
AMQP_PROXY_SESSIONS = 8192

#: How long an AMQP proxy tries to reach one node, in seconds.
AMQP_NODE_CONNECT = 5.0

#: How often a node is asked whether it serves, in seconds: one that does, and one that did not.
#: RabbitMQ writes a line to its log for each.
AMQP_CHECK, AMQP_CHECK_AGAIN = 10.0, 1.0
