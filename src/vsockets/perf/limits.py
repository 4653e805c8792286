"""Limits of ``vsock perf``, each with its reason."""

#: Longest write in bytes, and longest time in seconds for which a client may have the server send.
PERF_MESSAGE_MAX_BYTES = 1 << 20
PERF_RUN_MAX_SECONDS = 600.0

#: Seconds without progress after which a stream is closed.
PERF_SILENCE_SECONDS = 30.0

#: Streams that the server serves at the same time, each in a thread, and runs of datagrams whose
#: counts it keeps.
PERF_STREAMS_MAX = 64
PERF_RUNS_MAX = 1024

#: Samples that one measurement keeps for its percentiles: 16 MB.
PERF_SAMPLES_MAX = 2_000_000
