"""Limits of played machines."""

#: Clients of a machine's unix socket that wait to be accepted.
PLAYED_BACKLOG_MAX = 128

#: Bytes that the device reads at once, and may hold while the machine is paused.
PLAYED_BUFFER_BYTES = 65_536

#: Clones made by one request: each has a listener and a link to vsockd.
PLAYED_CLONES_MAX = 100

#: Seconds for the guest to accept a connection; Firecracker's device waits as long.
PLAYED_CONNECT_SECONDS = 2.0

#: Lines of the log of operations and faults that are kept.
PLAYED_LOG_LINES_MAX = 10_000

#: Ports of host ends that are remembered with their machine: more than all connections have.
PLAYED_PORTS_MAX = 65_536
