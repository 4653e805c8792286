"""Limits of the forwarder, each with its reason."""

#: Bytes and seconds for a proxy's client to send its request.  A request takes some hundred bytes
#: and is sent at once.
FORWARD_PROXY_REQUEST_MAX_BYTES = 16_384
FORWARD_PROXY_TIMEOUT_SECONDS = 10.0

#: Name lookups at the same time, each in a thread (others wait), and those of one guest, so that a
#: guest whose name servers do not answer delays no other guest.
FORWARD_LOOKUPS_MAX = 128
FORWARD_PARTY_LOOKUPS_MAX = 8

#: Time for one attempt to connect to a forward's target, in seconds: TCP retransmits a lost packet
#: of its handshake after one, three and seven seconds.
FORWARD_CONNECT_TIMEOUT_SECONDS = 10.0

#: Time for one address of a target before the next is tried beside it, in seconds (RFC 8305,
#: section 5), and the number of addresses tried: name servers may return any number.
FORWARD_NEXT_ADDRESS_SECONDS = 0.25
FORWARD_ADDRESSES_MAX = 16

#: Connections, or flows of datagrams, of one forward at the same time: each takes two or three
#: descriptors of the 20,000 or more that processes may have.  Later clients wait in the backlog.
FORWARD_CONNECTIONS_MAX = 4096

#: Silence after which a flow of datagrams is forgotten, in seconds.  NATs keep UDP mappings for at
#: least 120 (RFC 4787), but a guest without a network expects no NAT, and answers arrive at once.
FORWARD_FLOW_IDLE_SECONDS = 60.0

#: Streams whose bytes are reported to vsockd in one second, in turns: a report costs vsockd some
#: ten microseconds, and counts as a request of the forwarder.
FORWARD_BYTE_REPORTS_MAX = 64

#: Datagrams kept while a flow's target is looked up.
FORWARD_FLOW_PENDING_MAX = 16
