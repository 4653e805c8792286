"""Limits of ``vsock perf``, each with its reason."""

#: Bytes of one write, at most, and seconds that a client may have the server send.
PERF_MESSAGE_MAX_BYTES = 1 << 20
PERF_RUN_MAX_SECONDS = 600.0

#: Seconds after which a stream on which nothing happens is given up.
PERF_SILENCE_SECONDS = 30.0

#: Streams the server serves at the same time, each in a thread, and runs of datagrams it
#: remembers the counts of.
PERF_STREAMS_MAX = 64
PERF_RUNS_MAX = 1024

#: Times that one measurement keeps for its percentiles: 16 MB.
PERF_SAMPLES_MAX = 2_000_000
