"""Administration of vsockd: control socket, reports, events, audit."""
