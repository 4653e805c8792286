"""Limits of the VMCI device, each with its reason."""

#: Bytes of one guest's queue pairs, and their number.  That is a thousand streams of Linux's
#: default size, four times what VMware has (VMCI_MAX_GUEST_QP_MEMORY): under Linux the queue pairs
#: of closed streams wait for each other before they go.  The memory is the guest's; our views of
#: it are small.
VMCI_QUEUE_PAIR_MAX_BYTES = 512 << 20
VMCI_QUEUE_PAIRS_MAX = 4096

#: Doorbells of a guest: as many as its bitmap of one page has places.
VMCI_DOORBELLS_MAX = 4096

#: What waits for a guest to be read: bytes after which no program's datagram is taken any more
#: (VMCI_MAX_DATAGRAM_QUEUE_SIZE), and datagrams after which the guest may ask for nothing.
VMCI_DATAGRAM_QUEUE_MAX_BYTES = 2 * 17 * 4096
VMCI_DATAGRAM_QUEUE_MAX = 8192

#: Pieces a guest's buffer for datagrams may consist of.  Linux gives one.
VMCI_SCATTER_ELEMENTS_MAX = 32

#: How long a guest may take for each answer while a stream is set up, in seconds: longer than
#: connect() waits by default, because a guest of the older data path reads a datagram byte by
#: byte, and takes a second and a half for all of it under software emulation.
VMCI_HANDSHAKE_TIMEOUT_SECONDS = 5.0

#: How long a device goes on with one stream before it sees to others: fillings of its queue.
VMCI_PUMP_ROUNDS_PER_TURN = 4

#: How soon a device looks again at a queue that is being written to, in seconds: soon enough to
#: add no delay that matters, late enough that some writes come together.  It gives up, and is
#: told again, after so many looks that found nothing.
VMCI_QUEUE_POLL_SECONDS = 0.0002
VMCI_IDLE_QUEUE_POLLS_MAX = 6

#: How long a device spins, looking for a guest's answer to what a program sent, in seconds: while
#: they talk to each other.  Being told takes three exits of the guest.
VMCI_REPLY_POLL_SECONDS = 0.0005

#: And how long for what the program says next.
VMCI_NEXT_WRITE_POLL_SECONDS = 0.0001

#: How long a guest is told nothing of a stream but that it is there, in seconds, unless it has
#: said something itself: Linux's driver may take what follows an ATTACH before it, and then
#: connect() fails (EPROTO).  What is in the queue it can read meanwhile.
VMCI_ATTACH_HOLD_SECONDS = 0.01

#: How long a device lets a guest be that has something to read and does not, in seconds, before
#: it tells it once more: a reader may wait for more bytes than there were (SO_RCVLOWAT).
VMCI_REMINDER_SECONDS = 0.005

#: How long the guest's processor stands still at most for the answer to its connect, in
#: seconds; what takes longer is answered later.
VMCI_CONNECT_WAIT_SECONDS = 0.005

#: Streams of a guest that are being set up: a guest's pending connects.
VMCI_PENDING_STREAMS_MAX = 1024

#: Bytes a device holds of streams that a guest has closed and programs do not read.
VMCI_UNSENT_MAX_BYTES = 64 << 20
