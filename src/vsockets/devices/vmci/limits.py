"""Limits of the VMCI device, each with its reason."""

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

#: Time that a device polls for a guest's reply to a program's message, in seconds, while the two
#: exchange messages.  A notification takes three exits of the guest.
VMCI_REPLY_POLL_SECONDS = 0.0005

#: Time to poll the program's socket for its next write after delivering to it, in seconds.
VMCI_NEXT_WRITE_POLL_SECONDS = 0.0001

#: Time that packets wait after an ATTACH, in seconds, unless the guest sends a packet before:
#: Linux's driver may handle packets that follow an ATTACH before it, and then connect() fails
#: (EPROTO). Data in the queue can be read meanwhile.
VMCI_ATTACH_HOLD_SECONDS = 0.01

#: Time after which a guest that has unread data is notified again, in seconds: a reader may wait
#: for more bytes than it was notified of (SO_RCVLOWAT).
VMCI_REMINDER_SECONDS = 0.005

#: Longest time that the guest's processor is stopped for the reply to its connect, in seconds;
#: later replies are sent asynchronously.
VMCI_CONNECT_WAIT_SECONDS = 0.005

#: Streams of a guest whose handshake is pending.
VMCI_PENDING_STREAMS_MAX = 1024

#: Bytes that a device holds of streams that a guest has closed and programs have not read.
VMCI_UNSENT_MAX_BYTES = 64 << 20
