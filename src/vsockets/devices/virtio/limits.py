"""Limits of the virtio-vsock device, each with its reason."""

#: Parts of one chain of descriptors: what one system call takes.  Linux's packets have 18 at most.
VIRTIO_CHAIN_DESCRIPTORS_MAX = 1024

#: Connections of one guest through its virtio device.  Each may hold VIRTIO_BUFFER_BYTES bytes and
#: two descriptors here.
VIRTIO_CONNECTIONS_MAX = 4096

#: Bytes of one connection that the device holds for a slow reader of the host: the credit its
#: guest is given.  As large as VMCI's largest queue, and as Linux's own default.
VIRTIO_BUFFER_BYTES = 262_144

#: What a guest with more than 512 connections is given for each further one, in bytes: so that
#: all of them together hold 256 MiB at most.
VIRTIO_SMALL_BUFFER_BYTES = 32_768
VIRTIO_LARGE_BUFFERS_MAX = 512

#: Bytes of a connection whose program has a larger buffer: Linux's programs that do ask for some
#: megabytes.  A guest with more connections than this gets no more for that, so there are never
#: more of these at the same time, and they hold 128 MiB at most.
VIRTIO_ENLARGED_BUFFER_MAX_BYTES = 4 << 20
VIRTIO_ENLARGED_BUFFERS_MAX = 32

#: Bytes a guest counts for each packet that its program has not read, beside the payload.  Linux
#: resets a connection whose packets take more than its buffer (6.12.92 and later; commits
#: 059b7dbd20a6, c6087c5aaad6).  There a packet counts SKB_TRUESIZE(0), 576 bytes, or 1024 with
#: CONFIG_MAX_SKB_FRAGS=45.
VIRTIO_PACKET_OVERHEAD_BYTES = 1024

#: Payload up to which Linux copies a stream's packet into the last one that is not read yet, so
#: that both count as one (GOOD_COPY_LEN), and this is how small packets are made for it.
VIRTIO_MERGED_PACKET_MAX_BYTES = 128

#: How long a connection waits for the guest's credit before it is asked for again, in seconds:
#: when so many packets are unread that no other may be sent.
VIRTIO_CREDIT_RETRY_SECONDS = 1.0

#: Messages of a sequenced-packet connection that wait for a slow reader; empty ones take no
#: credit, and each costs us something.
VIRTIO_WAITING_MESSAGES_MAX = 65_536

#: Resets to the guest that wait for a buffer of it, before its packets wait, too.
VIRTIO_WAITING_RESETS_MAX = 256

#: Packets of the guest that are looked at in one turn, before other things get theirs.
VIRTIO_PACKETS_PER_TURN_MAX = 256

#: How long packets of a streaming guest may wait until some more have come, in seconds; and how
#: many may, so that a guest's ring is never full for that.
VIRTIO_KICK_DELAY_SECONDS = 0.004
VIRTIO_PACKETS_PER_KICK_MAX = 32

#: Packets of the guest that were taken without its being told that their memory is free again,
#: and for how long, in seconds: being told costs it an interrupt.
VIRTIO_USED_BATCH_PACKETS = 16
VIRTIO_USED_BATCH_SECONDS = 0.01

#: How long a guest may take to answer a connect, in seconds: Linux's listeners answer at once.
VIRTIO_CONNECT_TIMEOUT_SECONDS = 2.0

#: How long a guest may take to confirm the end of a connection, in seconds (as Linux waits).
VIRTIO_CLOSE_TIMEOUT_SECONDS = 8.0
