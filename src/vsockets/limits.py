"""Every limit of the product, each with its reason; the proxies of a protocol have their own."""

#: A VMCI datagram is at most 17 pages, its 24-byte header included; what is
#: left is the largest payload a datagram vSocket carries (EMSGSIZE above it).
MAX_DATAGRAM = 17 * 4096 - 24

#: Buffer sizes of the guide, page 14, in bytes.
DEFAULT_BUFFER_SIZE = 65_536
DEFAULT_BUFFER_MIN_SIZE = 128
DEFAULT_BUFFER_MAX_SIZE = 262_144

#: What is asked of the kernel at most as a socket's buffer, in bytes.  It doubles the number,
#: as a signed 32-bit integer, and cuts it to net.core.wmem_max in any case.
LARGEST_SEND_BUFFER = 1 << 30

#: Connections that wait for one listener, at most (net.core.somaxconn).
MAX_BACKLOG = 4096

#: How long one system call may hold vsockd up, in seconds.  Only closing what somebody else
#: sent can take longer; a signal ends that.
SLOW_CALL = 0.02

#: Threads that close descriptors which peers have sent.  A close can block for as long as the
#: sender likes, so another thread begins whenever all are busy.
DISPOSAL_THREADS = 16

#: How long connect() waits for the other side, in seconds (as Linux does).
CONNECT_TIMEOUT = 2.0

#: The longest connect timeout that a program may set, in seconds: what Linux takes
#: (MAX_SCHEDULE_TIMEOUT) where its clock has the most ticks in a second, 1000.
LONGEST_CONNECT_TIMEOUT = ((1 << 63) - 1) // 1000 - 2

#: How long a program waits for vsockd to answer anything else, in seconds.
#: vsockd answers in microseconds; only a stopped or dead one takes longer.
REQUEST_TIMEOUT = 10.0

#: How long vsockd lets a client hold a connection on which it says nothing, in
#: seconds.  The library's request is in the socket before vsockd looks.
SILENT_CLIENT = 10.0

#: What is served of one party in a turn of vsockd's loop, besides a new connection at each control
#: socket: requests, which take some 40 microseconds each, and connections that have ended; and the
#: parties whose turn it is.  So who has thousands of requests waiting keeps others waiting for less
#: than a millisecond.
REQUESTS_A_TURN = 16
ENDS_A_TURN = 64
PARTIES_A_TURN = 64

#: Answers of vsockd that wait for one client to read them.  Programs read one before they ask
#: again; each is memory of the host's kernel.
UNREAD_ANSWERS = 4

#: How soon vsockd tries again to announce a connection that could not be announced, in seconds.
ANNOUNCE_AGAIN = 0.02

#: How soon vsockd looks again for a stream that must end and was in no process it could look
#: into, in seconds: a guest's users expect its end within 100 ms.  Then half as often each
#: time, down to the second number.
CUT_AGAIN_AFTER = 0.01
CUT_AGAIN_AT_MOST = 1.0

#: How soon vsockd looks whether sockets that it reaches by a name have been closed, in seconds, and
#: then half as often each time, down to the second number.  Whoever asks for their ports, or
#: connects to them, need not wait for that.
SWEEP_AFTER = 1.0
SWEEP_AT_THE_LATEST = 10.0

#: How often what guests hold is counted anew for one that has reached a limit, in seconds at
#: least: counting costs about as much as a hundred requests.
COUNT_AGAIN = 0.05

#: Datagram sockets of a party that vsockd looks at for each new one of it, whether they are open:
#: then those that are not are half as many as the others at most.
LOOKS_A_BIND = 3

#: Sockets with names that are looked at in one go: some 200 microseconds.
LOOKS_A_PIECE = 64

#: Streams that are watched together: a look at one costs a look at all of these, some 150
#: microseconds. Each group is two descriptors; with very many streams groups become larger instead
#: of more.
STREAMS_A_GROUP = 128
STREAM_GROUPS = 512

#: How often a party may have vsockd find out whether one stream has ended, a second.
LOOKS_A_SECOND = 200

#: How often vsockd looks at how much a guest with many datagram routes has on its way, in
#: seconds: what a guest sends too much in that time, the host's memory can bear.
OUTFLOW_WATCH = 0.25

#: Events that wait for a subscriber who does not read, in bytes; later ones are counted.
EVENTS_UNREAD = 262_144

#: Ports in a row that are looked at for a free one, as by Linux (MAX_PORT_RETRIES): a program that
#: holds very many makes no other one's search long.
EPHEMERAL_TRIES = 24

#: Connections waiting in vsockd's own door: what Linux allows by default
#: (net.core.somaxconn).
CONTROL_BACKLOG = 4096

#: Datagram destinations one socket keeps open.  Each is a descriptor in the
#: program and one in vsockd; a service that answers more peers than this
#: pays one request to vsockd when a forgotten peer comes back.
DATAGRAM_ROUTES = 256

#: Bytes of one request on the administrator's socket: far above any of them.
CONTROL_REQUEST = 65_536

#: Bytes of a .vmx file.  VMware writes some thousands, 40,000 with every option set; what is
#: larger is a disk image named by mistake.
VMX_FILE = 1 << 20

# What one guest may have of the host, or one user of the host who is no administrator, unless the
# configuration says otherwise.  Each is far above what their programs use together, and what keeps
# one from starving the rest.

#: Sockets at the same time.  Each is one or two descriptors in vsockd, which may have hundreds of
#: thousands, or where it may not raise its limit as few as 4096: see DESCRIPTOR_RESERVE.
MAX_SOCKETS = 4096

#: Connections that were asked for and not yet accepted: a full backlog (MAX_BACKLOG) is shared by
#: four such parties, so none alone can fill a listener's.
MAX_PENDING_CONNECTS = 1024

#: Users of the host that vsockd remembers although they have nothing: how often they ask counts.
REMEMBERED_USERS = 1024

#: Descriptors that vsockd keeps free, of those it may have, or a quarter if that is less: for
#: requests that end at once, which need no more than a few at a time, whatever clients hold.
DESCRIPTOR_RESERVE = 1024

#: Requests a second: connects, binds, new datagram destinations.  A connect
#: takes vsockd about 100 microseconds, so nobody is served that many; it is for floods of
#: requests that cost less, those that are refused.
MAX_REQUEST_RATE = 20_000

#: Bytes of datagrams on their way from a guest: memory of the host's kernel.  64 MiB is
#: more than 900 of the largest.
MAX_DATAGRAM_BYTES = 64 << 20

#: Denials that are logged a second, for each context; the rest are counted.  A person reads
#: less, and a guest must not fill the host's disk.
AUDIT_RATE = 20

#: Lines that a program logs a second for each party that causes them (vsockets.logs), and parties
#: that are remembered.
LOG_RATE = 20
LOG_PARTIES = 1024

#: Bytes of the log of a vsockd that was started in the background, and as many of the one before:
#: it lies in memory, in most state folders.
LOG_FILE = 1 << 20

#: Bytes of one configuration file: some ten thousand guests.
CONFIGURATION_FILE = 1 << 20

#: Characters of the name of a guest or of a domain: what VMware allows a virtual machine.
LONGEST_NAME = 80

# A vhost-user device's process.

#: Bytes of a vhost-user message's payload: a table of eight regions has 264, a configuration
#: space at most 268.
VHOST_PAYLOAD = 4096

#: Descriptors that come with one message: one for each of eight regions.
VHOST_DESCRIPTORS = 8

#: How long a virtual machine's monitor may take to read an answer, in seconds: it waits for it.
VHOST_REPLY = 5.0

#: Regions of memory a monitor may give a device one by one (ADD_MEM_REG).  QEMU asks, and
#: plugs no more memory than that; libvhost-user says 509 as well, the kernel's vhost 64.
MEMORY_SLOTS = 509

#: Parts of one chain of descriptors: what one system call takes.  Linux's packets have 18 at most.
DESCRIPTOR_CHAIN = 1024

#: Connections of one guest through its virtio device.  Each may hold VIRTIO_BUFFER bytes and
#: two descriptors here.
VIRTIO_CONNECTIONS = 4096

#: Bytes of one connection that the device holds for a slow reader of the host: the credit its
#: guest is given.  As large as VMCI's largest queue, and as Linux's own default.
VIRTIO_BUFFER = 262_144

#: What a guest with more than 512 connections is given for each further one, in bytes: so that
#: all of them together hold 256 MiB at most.
VIRTIO_SMALL_BUFFER = 32_768
VIRTIO_LARGE_BUFFERS = 512

#: Bytes of a connection whose program has a larger buffer: Linux's programs that do ask for some
#: megabytes.  A guest with more connections than this gets no more for that, so there are never
#: more of these at the same time, and they hold 128 MiB at most.
VIRTIO_LARGEST_BUFFER = 4 << 20
VIRTIO_ENLARGED = 32

#: Bytes a guest counts for each packet that its program has not read, beside the payload.  Linux
#: resets a connection whose packets take more than its buffer (6.12.92 and later; commits
#: 059b7dbd20a6, c6087c5aaad6).  There a packet counts SKB_TRUESIZE(0), 576 bytes, or 1024 with
#: CONFIG_MAX_SKB_FRAGS=45.
VIRTIO_PACKET = 1024

#: Payload up to which Linux copies a stream's packet into the last one that is not read yet, so
#: that both count as one (GOOD_COPY_LEN), and this is how small packets are made for it.
VIRTIO_MERGED = 128

#: How long a connection waits for the guest's credit before it is asked for again, in seconds:
#: when so many packets are unread that no other may be sent.
CREDIT_AGAIN = 1.0

#: Messages of a sequenced-packet connection that wait for a slow reader; empty ones take no
#: credit, and each costs us something.
WAITING_MESSAGES = 65_536

#: Resets to the guest that wait for a buffer of it, before its packets wait, too.
WAITING_RESETS = 256

#: Packets of the guest that are looked at in one turn, before other things get theirs.
PACKETS_A_TURN = 256

#: How long packets of a streaming guest may wait until some more have come, in seconds; and how
#: many may, so that a guest's ring is never full for that.
KICK_DELAY = 0.004
PACKETS_A_KICK = 32

#: Packets of the guest that were taken without its being told that their memory is free again,
#: and for how long, in seconds: being told costs it an interrupt.
UNTOLD_PACKETS = 16
UNTOLD_DELAY = 0.01

#: How long a guest may take to answer a connect, in seconds: Linux's listeners answer at once.
GUEST_ANSWER = 2.0

#: How long a guest may take to confirm the end of a connection, in seconds (as Linux waits).
GUEST_FAREWELL = 8.0

# A device's process.

#: Regions of memory a virtual machine's monitor may give a device.  QEMU gives some tens; each
#: is a mapping and a descriptor.
DMA_REGIONS = 1024

#: Buffers one system call takes (UIO_MAXIOV).
VECTORS = 1024

#: Descriptors and bytes of one vfio-user message: a device has a few interrupts, and registers
#: of four bytes.
VFIO_DESCRIPTORS = 8
VFIO_TRANSFER = 4096

#: How long a virtual machine's monitor may take to read an answer, in seconds: it waits for it.
VFIO_REPLY = 5.0

# What a guest may have of a VMCI device's process.

#: Bytes of one guest's queue pairs, and their number.  That is a thousand streams of Linux's
#: default size, four times what VMware has (VMCI_MAX_GUEST_QP_MEMORY): under Linux the queue pairs
#: of closed streams wait for each other before they go.  The memory is the guest's; our views of
#: it are small.
QUEUE_PAIR_MEMORY = 512 << 20
QUEUE_PAIRS = 4096

#: Doorbells of a guest: as many as its bitmap of one page has places.
DOORBELLS = 4096

#: What waits for a guest to be read: bytes after which no program's datagram is taken any more
#: (VMCI_MAX_DATAGRAM_QUEUE_SIZE), and datagrams after which the guest may ask for nothing.
GUEST_QUEUE = 2 * 17 * 4096
GUEST_DATAGRAMS = 8192

#: Pieces a guest's buffer for datagrams may consist of.  Linux gives one.
SCATTER_ELEMENTS = 32

#: How long a guest may take for each answer while a stream is set up, in seconds: longer than
#: connect() waits by default, because a guest of the older data path reads a datagram byte by
#: byte, and takes a second and a half for all of it under software emulation.
HANDSHAKE = 5.0

#: Sockets that send datagrams for a guest's ports: the one longest unused makes room.
DATAGRAM_PORTS = 256

#: How long a device waits for vsockd, in seconds, while the guest's processor stands still.
#: vsockd answers in a tenth of a millisecond.
FABRIC_ANSWER = 0.5

#: How long a device goes on with one stream before it sees to others: fillings of its queue.
PUMP_ROUNDS = 4

#: How soon a device looks again at a queue that is being written to, in seconds: soon enough to
#: add no delay that matters, late enough that some writes come together.  It gives up, and is
#: told again, after so many looks that found nothing.
LOOK_AGAIN = 0.0002
LOOKS = 6

#: How long a device spins, looking for a guest's answer to what a program sent, in seconds: while
#: they talk to each other.  Being told takes three exits of the guest.
ANSWER = 0.0005

#: And how long for what the program says next.
NEXT_WORD = 0.0001

#: How long a guest is told nothing of a stream but that it is there, in seconds, unless it has
#: said something itself: Linux's driver may take what follows an ATTACH before it, and then
#: connect() fails (EPROTO).  What is in the queue it can read meanwhile.
AFTER_ATTACH = 0.01

#: How long a device lets a guest be that has something to read and does not, in seconds, before
#: it tells it once more: a reader may wait for more bytes than there were (SO_RCVLOWAT).
REMIND = 0.005

#: How long the guest's processor stands still at most for the answer to its connect, in
#: seconds; what takes longer is answered later.
FABRIC_PROMPT = 0.005

#: Streams of a guest that are being set up: a guest's pending connects.
PENDING_STREAMS = 1024

#: Bytes a device holds of streams that a guest has closed and programs do not read.
UNSENT_BYTES = 64 << 20

#: Bytes of a guest's datagrams that wait for one receiver (VMCI_MAX_DATAGRAM_QUEUE_SIZE).
UNSENT_DATAGRAMS = 2 * 17 * 4096

#: Sockets of supervised programs, theirs and ours, that a supervisor remembers.
#: vsockd can be asked about a forgotten one; each takes half a kilobyte.
SUPERVISED_SOCKETS = 65_536

#: How long a non-blocking connect() of a supervised program may take before the
#: program is told that it is in progress, in seconds.  vsockd answers in a tenth
#: of a millisecond; this is for when the machine is busy.  A program that is told
#: at once needs no second call, and hears at once that it has no port.
CONNECT_GRACE = 0.25

#: Descendants of a process among which ``vsock ls`` looks for who has a socket: it takes ten
#: microseconds for each descriptor, and a hostile program has as many processes as it likes.
SEARCHED_PROCESSES = 4096

#: How often a supervisor looks whether a thread it has an answer for has taken its signals, and
#: how long it waits for that, in seconds.  A thread takes them at once, unless it gets no
#: processor, or they come faster than it can take them.
SIGNAL_LOOK, SIGNAL_PATIENCE = 0.001, 1.0

#: How soon a supervisor tries again to reach a vsockd whose backlog is full, in seconds: only
#: a stopped one lets 4096 connections wait.
KNOCK_AGAIN = 0.05

#: Datagram routes of supervised programs that a supervisor keeps: each is a descriptor
#: of its process, of which a user may have 1024 by default.
SUPERVISED_ROUTES = 512

#: A send buffer above net.core.wmem_max, in bytes, up to which a privileged supervisor
#: does what its program asks for; the kernel's own AF_VSOCK has no limit at all.
FORCED_SEND_BUFFER = 4 << 20

# Hybrid vsock.

#: Bytes of a line of the handshake: ``CONNECT`` and a port have 19, and Firecracker reads no more
#: than these.
HYBRID_LINE = 32

#: Bytes of the name of a unix socket with ports beside it: ``_`` and a port come after it, and a
#: folder's descriptor (``/proc/self/fd/…``) before, and a socket's path has 107.
HYBRID_NAME = 76

#: Connections through one hybrid-vsock device, established or not.  Firecracker allows its guest
#: 1023; each is two descriptors, and four more while a reader is slow.
HYBRID_CONNECTIONS = 1024

#: Ports of the host that a hybrid-vsock device offers its guest: each is a descriptor and a file.
HYBRID_PORTS = 4096

#: How long a guest may take to accept through hybrid vsock, in seconds.  Who connects has a
#: timeout of his own, two seconds by default; this is for those who have none, or a longer one.
HYBRID_ANSWER = 10.0

#: How soon a hybrid-vsock device tries again to reach a guest that is waited for, in seconds.
HYBRID_PAUSE = 0.05

# The forwarder (vsockets.forward).

#: Bytes of the pipe that one direction of a forwarded stream moves through, and so the most
#: that is on its way in it.  Measured on this project's machine, splice gains nothing above.
FORWARD_PIPE = 256 * 1024

#: Empty pipes that are kept for the next who needs one.  A pipe is needed only while its sink
#: is full, or within one call; so this many sinks can be slow before pipes are made anew.
FORWARD_SPARE_PIPES = 64

#: Bytes of one direction before it is another's turn: a few milliseconds at most.
FORWARD_TURN = 4 << 20

#: Bytes and seconds in which a proxy's client must have said where it wants to go.  A request
#: takes some hundred bytes, and is sent at once.
FORWARD_PROXY_REQUEST = 16_384
FORWARD_PROXY_SECONDS = 10.0

#: Names that are looked up at the same time, each by a thread; others wait for their turn.  And
#: those of one guest, so that its name servers, which may be silent, are a matter of its own.
FORWARD_LOOKUPS = 128
FORWARD_PARTY_LOOKUPS = 8

#: First and longest pause before a target that is not there yet is tried again, in seconds.
FORWARD_FIRST_PAUSE, FORWARD_LONGEST_PAUSE = 0.01, 0.5

#: How long one attempt to reach a forward's target may take, in seconds: a lost packet of TCP's
#: handshake is sent again after one, three and seven.
FORWARD_CONNECT_TIMEOUT = 10.0

#: How long one address of a target may take before the next one is tried beside it, in seconds
#: (RFC 8305, section 5), and how many addresses are tried: name servers may return any number.
FORWARD_NEXT_ADDRESS = 0.25
FORWARD_ADDRESSES = 16

#: Connections of one forward at the same time, or flows of datagrams: each takes two or three
#: descriptors of the 20,000 or more that processes may have.  Later clients wait in the backlog.
FORWARD_CONNECTIONS = 4096

#: Connections or datagrams that are taken from one socket before it is another's turn.
FORWARD_ACCEPTS = 64

#: After how long a silent flow of datagrams is forgotten, in seconds: what NATs do for UDP at
#: least is 120 (RFC 4787), but who has no network knows no NAT, and answers come at once.
FORWARD_FLOW_IDLE = 60.0

#: Datagrams kept while a flow's target is looked up.
FORWARD_FLOW_PENDING = 16

#: Contexts that have metrics of their own, those with the lowest CIDs: each is some twenty time
#: series, of which a Prometheus server has room for a few million.
METRICS_CONTEXTS = 500

# Over HTTP, on this machine (vsockets.cli.http_server).

#: How long a client may take for its whole request, and to read one piece of the answer, in
#: seconds.
HTTP_REQUEST = 5.0
HTTP_ANSWER = 5.0

#: How long who was refused in the midst of a request may go on sending it, in seconds: until he
#: has read the answer.
HTTP_LINGER = 1.0

#: Bytes of a request's head, and of its body: a browser's head has some hundred, a body here
#: names one context or stream.
HTTP_HEAD = 16_384
HTTP_BODY = 4096

#: Clients at the same time that the handler does not know, and that it knows.  A browser has up
#: to six, of which one stays for as long as the page is looked at.
HTTP_CLIENTS = 128
HTTP_KNOWN_CLIENTS = 64

#: Connections accepted at a time: so few that a client whose request comes with its connection
#: is known before HTTP_CLIENTS others have come after it.
HTTP_ACCEPTS = 16

#: Connections that wait to be accepted.
HTTP_BACKLOG = 1024

# vsock web.

#: Contexts and streams that are listed on the page, the busiest first; it says how many are not.
#: More than people look at, and less than slows a browser down.
WEB_CONTEXTS = 100
WEB_STREAMS = 500

#: Events the page shows, and that are kept for one that opens or comes back.
WEB_EVENTS = 200

#: Sessions at the same time, one for each link that was opened; the oldest is forgotten.
WEB_SESSIONS = 16

# Measuring (vsockets.perf).

#: Bytes of one write, at most, and seconds that a client may have the server send.
PERF_MESSAGE = 1 << 20
PERF_SECONDS = 600.0

#: Seconds after which a stream on which nothing happens is given up.
PERF_SILENCE = 30.0

#: Streams the server serves at the same time, each in a thread, and runs of datagrams it
#: remembers the counts of.
PERF_STREAMS = 64
PERF_RUNS = 1024

#: Times that one measurement keeps for its percentiles: 16 MB.
PERF_SAMPLES = 2_000_000

#: Bytes of one payload in a capture, at most: what the forwarder reads at a time, and less than
#: Wireshark takes (262,144).
CAPTURE_PAYLOAD = 65_536

#: Bytes that wait for who captures at a device and is slow; what comes then is counted.  Some
#: hundredths of a second of all a device can carry.
CAPTURE_BUFFER = 4 << 20

#: Captures of one device at the same time: each costs it a system call for each packet.
CAPTURES = 4

#: Characters that are read of what a command says in a guest (vsockets.vm.guest_client): a digest,
#: a version, a complaint.
GUEST_SAYS = 65_536
