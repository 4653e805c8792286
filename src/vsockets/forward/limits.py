"""Limits of the forwarder, each with its reason."""

#: Bytes and seconds in which a proxy's client must have said where it wants to go.  A request
#: takes some hundred bytes, and is sent at once.
FORWARD_PROXY_REQUEST_MAX_BYTES = 16_384
FORWARD_PROXY_TIMEOUT_SECONDS = 10.0

#: Names that are looked up at the same time, each by a thread; others wait for their turn.  And
#: those of one guest, so that its name servers, which may be silent, are a matter of its own.
FORWARD_LOOKUPS_MAX = 128
FORWARD_PARTY_LOOKUPS_MAX = 8

#: How long one attempt to reach a forward's target may take, in seconds: a lost packet of TCP's
#: handshake is sent again after one, three and seven.
FORWARD_CONNECT_TIMEOUT_SECONDS = 10.0

#: How long one address of a target may take before the next one is tried beside it, in seconds
#: (RFC 8305, section 5), and how many addresses are tried: name servers may return any number.
FORWARD_NEXT_ADDRESS_SECONDS = 0.25
FORWARD_ADDRESSES_MAX = 16

#: Connections of one forward at the same time, or flows of datagrams: each takes two or three
#: descriptors of the 20,000 or more that processes may have.  Later clients wait in the backlog.
FORWARD_CONNECTIONS_MAX = 4096

#: After how long a silent flow of datagrams is forgotten, in seconds: what NATs do for UDP at
#: least is 120 (RFC 4787), but who has no network knows no NAT, and answers come at once.
FORWARD_FLOW_IDLE_SECONDS = 60.0

#: Datagrams kept while a flow's target is looked up.
FORWARD_FLOW_PENDING_MAX = 16
