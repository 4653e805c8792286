"""Limits of the command-line tools, each with its reason."""

#: Processes that ``vsock ls`` searches for the owner of a socket, beginning with the one that
#: vsockd knows: each descriptor takes ten microseconds, and a hostile program can have any number
#: of children.
SOCKET_OWNERS_PROCESSES_MAX = 4096

#: Contexts with metrics of their own, those with the lowest CIDs: each has some twenty time series,
#: and a Prometheus server holds a few million.
METRICS_CONTEXTS_MAX = 500

#: Seconds for a client to send its whole request, and to read one piece of the response.
HTTP_REQUEST_TIMEOUT_SECONDS = 5.0
HTTP_WRITE_TIMEOUT_SECONDS = 5.0

#: Seconds to read and discard the rest of a rejected request, so that its client gets the response
#: before the connection is reset.
HTTP_LINGER_SECONDS = 1.0

#: Bytes of a request's head, and of its body: a browser sends a head of some hundred bytes, and a
#: body names one context or stream.
HTTP_HEAD_MAX_BYTES = 16_384
HTTP_BODY_MAX_BYTES = 4096

#: Concurrent connections without and with a session.  A browser opens up to six, one of which stays
#: open as long as the page.
HTTP_CLIENTS_MAX = 128
HTTP_SESSION_CLIENTS_MAX = 64

#: Connections accepted per turn of the event loop: few enough that a client whose request arrives
#: with its connection gets its session before HTTP_CLIENTS_MAX others are accepted after it.
HTTP_ACCEPTS_PER_TURN_MAX = 16

#: Backlog of the listening socket.
HTTP_BACKLOG_MAX = 1024

#: Contexts and streams listed on the page, the busiest first; the page shows how many are left out.
#: More than a person reads, and fewer than would slow a browser down.
WEB_CONTEXTS_MAX = 100
WEB_STREAMS_MAX = 500

#: Events kept for the page, and sent to one that opens or reconnects.
WEB_EVENTS_MAX = 200

#: Concurrent sessions, one for each opened link; the oldest is dropped.
WEB_SESSIONS_MAX = 16
