"""Limits of devices, each with its reason."""

#: Bytes of a vhost-user message's payload: a table of eight regions has 264, a configuration space
#: at most 268.
VHOST_USER_PAYLOAD_MAX_BYTES = 4096

#: Descriptors of one message: one for each of eight regions.
VHOST_USER_DESCRIPTORS_MAX = 8

#: Time for a monitor to read a reply, in seconds; a monitor waits for each reply it requested.
VHOST_USER_REPLY_TIMEOUT_SECONDS = 5.0

#: Regions of memory that a monitor may add one by one (ADD_MEM_REG). QEMU requests this number and
#: never exceeds it; libvhost-user has 509 as well, the kernel's vhost 64.
VHOST_USER_MEMORY_SLOTS_MAX = 509

#: Regions of memory of one virtual machine.  QEMU maps some tens; each is a mapping and a
#: descriptor.
DMA_REGIONS_MAX = 1024

#: Buffers of one system call (UIO_MAXIOV).
IO_VECTORS_MAX = 1024

#: Descriptors and bytes of one vfio-user message: a device has a few interrupts, and registers of
#: four bytes.
VFIO_USER_DESCRIPTORS_MAX = 8
VFIO_USER_TRANSFER_MAX_BYTES = 4096

#: Time for a monitor to read a reply, in seconds; a monitor waits for each reply it requested.
VFIO_USER_REPLY_TIMEOUT_SECONDS = 5.0

#: Sockets that send datagrams for a guest's ports: the least recently used one is closed first.
DEVICE_DATAGRAM_PORTS_MAX = 256

#: Time that a device waits for vsockd, in seconds, while the guest's processor is stopped.  vsockd
#: replies in a tenth of a millisecond.
DEVICE_VSOCKD_REPLY_TIMEOUT_SECONDS = 0.5

#: Bytes of a guest's datagrams that wait for one receiver (VMCI_MAX_DATAGRAM_QUEUE_SIZE).
DEVICE_UNSENT_DATAGRAM_MAX_BYTES = 2 * 17 * 4096

#: Concurrent captures of one device: each costs the device a system call for each packet.
DEVICE_CAPTURES_MAX = 4

#: Longest system call of a device, in seconds: only closing a descriptor that a peer passed takes
#: longer, and a signal interrupts it.
DEVICE_SLOW_CALL_SECONDS = 0.005

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

#: Bytes of one guest's queue pairs, and their number.  That is a thousand streams of Linux's
#: default size, four times what VMware has (VMCI_MAX_GUEST_QP_MEMORY): under Linux the queue pairs
#: of closed streams wait for each other before they are released.  The memory is the guest's; the
#: device's views of it are small.
VMCI_QUEUE_PAIR_MAX_BYTES = 512 << 20
VMCI_QUEUE_PAIRS_MAX = 4096

#: Doorbells of a guest: as many as its bitmap of one page holds.
VMCI_DOORBELLS_MAX = 4096

#: Limits of the queue for the guest: bytes above which no datagram of a program is accepted
#: (VMCI_MAX_DATAGRAM_QUEUE_SIZE), and datagrams above which the guest's control packets are
#: refused.
VMCI_DATAGRAM_QUEUE_MAX_BYTES = 2 * 17 * 4096
VMCI_DATAGRAM_QUEUE_MAX = 8192

#: Elements of a guest's buffer for datagrams.  Linux uses one.
VMCI_SCATTER_ELEMENTS_MAX = 32

#: Time for each reply of a guest during the handshake of a stream, in seconds: longer than
#: connect() waits by default, because a guest with byte ports reads a datagram byte by byte, and
#: takes a second and a half for the whole handshake under software emulation.
VMCI_HANDSHAKE_TIMEOUT_SECONDS = 5.0

#: Fillings of a stream's queue that a device transfers before it serves other streams.
VMCI_PUMP_ROUNDS_PER_TURN = 4

#: Interval at which a device polls a queue that is being written to, in seconds: short enough to
#: add no relevant delay, long enough to collect some writes.  After so many polls without data the
#: device stops polling, and waits for a notification.
VMCI_QUEUE_POLL_SECONDS = 0.0002
VMCI_IDLE_QUEUE_POLLS_MAX = 6

#: Interval at which a device checks if a guest has enabled interrupts, in seconds, while datagrams
#: wait for that: short beside the 2 seconds of a connect, which they may belong to.
VMCI_INTERRUPTS_POLL_SECONDS = 0.1

#: Time that a device polls for a guest's reply to a program's message, in seconds, while the two
#: exchange messages.  A notification takes three exits of the guest.
VMCI_REPLY_POLL_SECONDS = 0.0005

#: Time to poll the program's socket for its next write after delivering to it, in seconds.
VMCI_NEXT_WRITE_POLL_SECONDS = 0.0001

#: Time that packets wait after an ATTACH, in seconds, unless the guest sends a packet before:
#: Linux's driver may handle packets that follow an ATTACH before it, and then connect() fails
#: (EPROTO). Data in the queue can be read meanwhile.
VMCI_ATTACH_HOLD_SECONDS = 0.01

#: The same as a multiple of the guest's last reply in the handshake: on a busy machine, a guest
#: needs much longer than :data:`VMCI_ATTACH_HOLD_SECONDS` for either; and the longest such time.
VMCI_ATTACH_HOLD_REPLIES = 3
VMCI_ATTACH_HOLD_MAX_SECONDS = 0.5

#: Time after which a guest that has unread data is notified again, in seconds: a reader may wait
#: for more bytes than it was notified of (SO_RCVLOWAT).
VMCI_REMINDER_SECONDS = 0.005

#: Longest time that the guest's processor is stopped for the reply to its connect, in seconds;
#: later replies are sent asynchronously.
VMCI_CONNECT_WAIT_SECONDS = 0.005

#: The part of that time for which the device serves nothing else, in seconds. Device and guest's
#: processor sleep; afterwards the latter polls. vsockd replies in a tenth of a millisecond.
VMCI_CONNECT_STOP_SECONDS = 0.001

#: Streams of a guest whose handshake is pending.
VMCI_PENDING_STREAMS_MAX = 1024

#: Bytes that a device holds of streams that a guest has closed and programs have not read.
VMCI_UNSENT_MAX_BYTES = 64 << 20

#: Connections of one hybrid-vsock device, pending ones included.  Firecracker allows its guest
#: 1023; each takes two descriptors, and four more while a reader is slow.
HYBRID_CONNECTIONS_MAX = 1024

#: Host ports of one hybrid-vsock device: each takes a descriptor and a file.
HYBRID_PORTS_MAX = 4096

#: Time for a guest to accept a connect, in seconds.  A client has its own timeout, two seconds by
#: default; this bounds clients without one, or with a longer one.
HYBRID_CONNECT_TIMEOUT_SECONDS = 10.0

#: Interval between attempts to reach a guest that does not listen yet, in seconds.
HYBRID_RETRY_SECONDS = 0.05
