"""Limits of played machines."""

#: Pause in seconds after an accept() that failed, for want of descriptors for example.
PLAYED_ACCEPT_PAUSE_SECONDS = 0.1

#: Seconds by which a guest's clock can be behind after one restore: a hundred years.
PLAYED_ASLEEP_SECONDS_MAX = 100 * 366 * 86_400.0

#: Clients of a machine's unix socket that wait to be accepted.
PLAYED_BACKLOG_MAX = 128

#: Pause in seconds before the device connects again to a host's listener whose backlog was full.
PLAYED_BACKLOG_PAUSE_SECONDS = 0.01

#: Bytes that the device reads at once, and may hold while the machine is paused.
PLAYED_BUFFER_BYTES = 65_536

#: Clones made by one request: each has a listener and a link to vsockd.
PLAYED_CLONES_MAX = 100

#: Seconds for the guest or its host to accept a connection; Firecracker's device waits as long for
#: the guest.
PLAYED_CONNECT_SECONDS = 2.0

#: Lines of the log of operations and faults that are kept.
PLAYED_LOG_LINES_MAX = 10_000

#: Ports of host ends that are remembered with their machine: more than all connections have.
PLAYED_PORTS_MAX = 65_536
