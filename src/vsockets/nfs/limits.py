"""Every limit of network storage, each with its reason."""

#: Answers kept for one guest, for when it asks again: more than it has calls on their way, by
#: far.  And guests they are kept for; each answer takes some hundred bytes, as reads are not kept.
NFS_GUEST_DUPLICATES, NFS_DUPLICATES = 1024, 1024

#: How long a client waits for the first answer, for any at least and at most, in seconds.  The
#: least is some sixty times what an answer takes: a busy processor's turn, and what each loss
#: costs.  The most is short: a server that was started again is there at once.
NFS_FIRST_WAIT, NFS_SHORTEST_WAIT, NFS_LONGEST_WAIT = 0.5, 0.03, 2.0

#: How long a client sends one call again before the file is in error, in seconds: longer than
#: any restart takes.
NFS_PATIENCE = 120.0

#: How long a mount waits before it says that no server answers, in seconds.
NFS_FIRST_WORD = 3.0

#: Calls of one client on their way at most: as many answers of 64 KiB fit a datagram socket's
#: buffer as Linux has it by default (net.core.wmem_default).
NFS_WINDOW = 4

#: How soon a call is sent again that found a queue on this machine full, in seconds: some of those
#: before it have been served by then.
NFS_QUEUE_FULL = 0.002

#: Files that a server holds a descriptor of, the last used ones: half of what processes may have
#: by default.
NFS_OPEN = 512

#: Places where a server knows files to be, the last told; about 200 bytes each.  The handle of a
#: file that is in none of them has become stale.  When there are too many the guest that has most
#: loses its oldest.
NFS_PLACES = 1_000_000

#: Places that are kept in memory while they cannot be written to the disk.
NFS_UNSAVED = 100_000

#: Bytes on the disk that are kept free for what was answered, for when it is full: the answers of
#: some thousand calls.
NFS_RESERVE = 4 << 20

#: How deep a file may lie to be found by its handle.
NFS_DEPTH = 256

#: Names in one part of a listing, which take some 200 bytes each; and in all parts that a server
#: remembers, and in those of one guest.
NFS_LISTED = 200_000
NFS_ALL_LISTED, NFS_GUEST_LISTED = 1_000_000, 250_000

#: Names that are read from a directory before other calls are served: two milliseconds or so.  And
#: directories with more names that are read at the same time, in all and by one guest.
NFS_STEP = 500
NFS_READING, NFS_GUEST_READING = 6, 1

#: Entries of one READDIR, and of one READDIRPLUS, which takes a lookup for each: some milliseconds.
NFS_NAMES, NFS_ENTRIES = 1024, 64

#: How long calls are answered before the sockets are looked at again, in seconds; datagrams that
#: are taken from one then, as many as a queue of the kernel usually holds; and calls of one guest
#: that wait meanwhile: clients have a few on their way.
NFS_TURN = 0.005
NFS_DATAGRAMS = 512
NFS_QUEUE = 64

#: Bytes of a file that a client holds until the server has them on its disk.
NFS_UNCOMMITTED = 4 << 20
