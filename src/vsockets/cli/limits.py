"""Limits of the command-line tools, each with its reason."""

#: Descendants of a process among which ``vsock ls`` looks for who has a socket: it takes ten
#: microseconds for each descriptor, and a hostile program has as many processes as it likes.
SOCKET_OWNERS_PROCESSES_MAX = 4096

#: Contexts that have metrics of their own, those with the lowest CIDs: each is some twenty time
#: series, of which a Prometheus server has room for a few million.
METRICS_CONTEXTS_MAX = 500

#: How long a client may take for its whole request, and to read one piece of the answer, in
#: seconds.
HTTP_REQUEST_TIMEOUT_SECONDS = 5.0
HTTP_WRITE_TIMEOUT_SECONDS = 5.0

#: How long who was refused in the midst of a request may go on sending it, in seconds: until he
#: has read the answer.
HTTP_LINGER_SECONDS = 1.0

#: Bytes of a request's head, and of its body: a browser's head has some hundred, a body here
#: names one context or stream.
HTTP_HEAD_MAX_BYTES = 16_384
HTTP_BODY_MAX_BYTES = 4096

#: Clients at the same time that the handler does not know, and that it knows.  A browser has up
#: to six, of which one stays for as long as the page is looked at.
HTTP_CLIENTS_MAX = 128
HTTP_SESSION_CLIENTS_MAX = 64

#: Connections accepted at a time: so few that a client whose request comes with its connection
#: is known before HTTP_CLIENTS_MAX others have come after it.
HTTP_ACCEPTS_PER_TURN_MAX = 16

#: Connections that wait to be accepted.
HTTP_BACKLOG_MAX = 1024

#: Contexts and streams that are listed on the page, the busiest first; it says how many are not.
#: More than people look at, and less than slows a browser down.
WEB_CONTEXTS_MAX = 100
WEB_STREAMS_MAX = 500

#: Events the page shows, and that are kept for one that opens or comes back.
WEB_EVENTS_MAX = 200

#: Sessions at the same time, one for each link that was opened; the oldest is forgotten.
WEB_SESSIONS_MAX = 16
