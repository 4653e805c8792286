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
#: file that is in none of them has become stale.
NFS_PLACES = 1_000_000

#: How deep a file may lie to be found by its handle.
NFS_DEPTH = 256

#: Listings of directories that a server remembers.
NFS_LISTINGS = 16

#: Bytes of a file that a client holds until the server has them on its disk.
NFS_UNCOMMITTED = 4 << 20
