"""Every limit of network storage, each with its reason."""

#: Answers kept for one guest, for when it asks again: more than it has calls on their way, by
#: far.  And guests they are kept for; each answer takes some hundred bytes, as reads are not kept.
NFS_GUEST_CACHED_REPLIES_MAX, NFS_CACHED_GUESTS_MAX = 1024, 1024

#: How long a client waits for the first answer, for any at least and at most, in seconds.  The
#: least is some sixty times what an answer takes: a busy processor's turn, and what each loss
#: costs.  The most is short: a server that was started again is there at once.
NFS_RETRY_FIRST_SECONDS, NFS_RETRY_MIN_SECONDS, NFS_RETRY_MAX_SECONDS = 0.5, 0.03, 2.0

#: How long a client sends one call again before the file is in error, in seconds: longer than
#: any restart takes.
NFS_CALL_TIMEOUT_SECONDS = 120.0

#: How long a mount waits before it says that no server answers, in seconds.
NFS_FIRST_WORD = 3.0

#: Calls of one client on their way at most: as many answers of 64 KiB fit a datagram socket's
#: buffer as Linux has it by default (net.core.wmem_default).
NFS_CALLS_IN_FLIGHT_MAX = 4

#: How soon a call is sent again that found a queue on this machine full, in seconds: some of those
#: before it have been served by then.
NFS_QUEUE_FULL_RETRY_SECONDS = 0.002

#: Files that a server holds a descriptor of, the last used ones: half of what processes may have
#: by default.
NFS_OPEN_FILES_MAX = 512

#: Places where a server knows files to be, the last told; about 200 bytes each.  The handle of a
#: file that is in none of them has become stale.  When there are too many the guest that has most
#: loses its oldest.
NFS_HANDLES_MAX = 1_000_000

#: Places that are kept in memory while they cannot be written to the disk.
NFS_UNSAVED_HANDLES_MAX = 100_000

#: Bytes on the disk that are kept free for what was answered, for when it is full: the answers of
#: some thousand calls.
NFS_DISK_RESERVE_BYTES = 4 << 20

#: How deep a file may lie to be found by its handle.
NFS_DIRECTORY_DEPTH_MAX = 256

#: Names in one part of a listing, which take some 200 bytes each; and in all parts that a server
#: remembers, and in those of one guest.
NFS_LISTING_PART_NAMES_MAX = 200_000
NFS_LISTED_NAMES_MAX, NFS_GUEST_LISTED_NAMES_MAX = 1_000_000, 250_000

#: Names that are read from a directory before other calls are served: two milliseconds or so.  And
#: directories with more names that are read at the same time, in all and by one guest.
NFS_NAMES_PER_STEP_MAX = 500
NFS_LARGE_LISTINGS_MAX, NFS_GUEST_LARGE_LISTINGS_MAX = 6, 1

#: Entries of one READDIR, and of one READDIRPLUS, which takes a lookup for each: some milliseconds.
NFS_READDIR_ENTRIES_MAX, NFS_READDIRPLUS_ENTRIES_MAX = 1024, 64

#: How long calls are answered before the sockets are looked at again, in seconds; datagrams that
#: are taken from one then, as many as a queue of the kernel usually holds; and calls of one guest
#: that wait meanwhile: clients have a few on their way.
NFS_TURN_MAX_SECONDS = 0.005
NFS_DATAGRAMS_PER_TURN_MAX = 512
NFS_GUEST_WAITING_CALLS_MAX = 64

#: Bytes of a file that a client holds until the server has them on its disk.
NFS_UNCOMMITTED_MAX_BYTES = 4 << 20
