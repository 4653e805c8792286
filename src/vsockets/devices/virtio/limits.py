"""Limits of the virtio-vsock device, each with its reason."""

#: Descriptors of one chain: the buffers of one system call.  Linux's packets have 18 at most.
VIRTIO_CHAIN_DESCRIPTORS_MAX = 1024

#: Connections of one guest through its virtio device.  Each may hold VIRTIO_BUFFER_BYTES bytes and
#: two descriptors of the device.
VIRTIO_CONNECTIONS_MAX = 4096

#: Bytes that the device holds for a slow reader of the host: the credit of the guest.  As large as
#: VMCI's largest queue, and as Linux's default.
VIRTIO_BUFFER_BYTES = 262_144

#: Buffer of each further connection of a guest with more than 512 connections, in bytes: together
#: they hold 256 MiB at most.
VIRTIO_SMALL_BUFFER_BYTES = 32_768
VIRTIO_LARGE_BUFFERS_MAX = 512

#: Buffer of a connection whose program has a larger buffer, in bytes: Linux programs that set one
#: set some megabytes.  A guest with more connections than this gets no larger buffers, so that no
#: more of these exist at a time; they hold 128 MiB at most.
VIRTIO_ENLARGED_BUFFER_MAX_BYTES = 4 << 20
VIRTIO_ENLARGED_BUFFERS_MAX = 32

#: Bytes that a guest counts for each packet that its program has not read, beside the payload.
#: Linux resets a connection whose packets take more than its buffer (6.12.92 and later; commits
#: 059b7dbd20a6, c6087c5aaad6). There a packet counts SKB_TRUESIZE(0), 576 bytes, or 1024 with
#: CONFIG_MAX_SKB_FRAGS=45.
VIRTIO_PACKET_OVERHEAD_BYTES = 1024

#: Largest payload that Linux copies into the last unread packet of a stream, so that both count as
#: one (GOOD_COPY_LEN). The device makes packets of this size for that purpose.
VIRTIO_MERGED_PACKET_MAX_BYTES = 128

#: Time after which a connection without room for another unread packet requests the guest's credit
#: again, in seconds.
VIRTIO_CREDIT_RETRY_SECONDS = 1.0

#: Messages of a sequenced-packet connection that wait for a slow reader; empty ones take no
#: credit, but memory of the device.
VIRTIO_WAITING_MESSAGES_MAX = 65_536

#: Resets that wait for a buffer of the guest, before the guest's packets must wait, too.
VIRTIO_WAITING_RESETS_MAX = 256

#: Packets of the guest that are handled in one turn, before other work runs.
VIRTIO_PACKETS_PER_TURN_MAX = 256

#: Longest time that packets of a streaming guest wait for further packets, in seconds; and the
#: largest number of waiting packets, so that they never fill the guest's ring.
VIRTIO_KICK_DELAY_SECONDS = 0.004
VIRTIO_PACKETS_PER_KICK_MAX = 32

#: Used buffers, and the longest time in seconds, to batch into one used-buffer notification: it
#: costs the guest an interrupt.
VIRTIO_USED_BATCH_PACKETS = 16
VIRTIO_USED_BATCH_SECONDS = 0.01

#: Time for a guest to answer a connect, in seconds: Linux's listeners answer at once.
VIRTIO_CONNECT_TIMEOUT_SECONDS = 2.0

#: Time for a guest to confirm the end of a connection, in seconds (as Linux waits).
VIRTIO_CLOSE_TIMEOUT_SECONDS = 8.0
