"""Limits of the NFS server and client, each with its reason."""

#: Replies cached for one guest, for retransmitted calls: many more than it has calls in flight.
#: And guests with cached replies, and replies in all, each with 512 bytes of a file that has 4 MiB.
NFS_GUEST_CACHED_REPLIES_MAX, NFS_CACHED_GUESTS_MAX = 1024, 1024
NFS_CACHED_REPLIES_MAX = 8191

#: Retransmission timeout in seconds: the first one, the minimum and the maximum.  The minimum is
#: about sixty times a usual round trip: a time slice of a busy processor, and the cost of each
#: loss.  The maximum is short so that a restarted server is found at once.
NFS_RETRY_FIRST_SECONDS, NFS_RETRY_MIN_SECONDS, NFS_RETRY_MAX_SECONDS = 0.5, 0.03, 2.0

#: Seconds of retransmission before a call fails: longer than any restart of the server takes.
NFS_CALL_TIMEOUT_SECONDS = 120.0

#: Seconds after which a mount reports that no server answers, and goes on trying.
NFS_NO_REPLY_WARNING_SECONDS = 3.0

#: Calls of one client in flight: as many replies of 64 KiB as fit a datagram socket's buffer of
#: Linux's default size (net.core.wmem_default).
NFS_CALLS_IN_FLIGHT_MAX = 4

#: Seconds until a call is sent again that found a local queue full: part of the queue has been
#: served by then.
NFS_QUEUE_FULL_RETRY_SECONDS = 0.002

#: Least recently used files a server keeps open: half of the default descriptor limit of a process.
NFS_OPEN_FILES_MAX = 512

#: File locations that a server records, the newest ones; about 200 bytes each.  A handle of a file
#: at none of them is stale.  Above the limit, the guest with the most locations loses its oldest.
NFS_HANDLES_MAX = 1_000_000

#: File locations kept in memory while they cannot be written to disk.
NFS_UNSAVED_HANDLES_MAX = 100_000

#: Maximum depth of a file below its export, for finding it by its handle.
NFS_DIRECTORY_DEPTH_MAX = 256

#: Names in one part of a listing, about 200 bytes each; names in all cached parts, and in those of
#: one guest.
NFS_LISTING_PART_NAMES_MAX = 200_000
NFS_LISTED_NAMES_MAX, NFS_GUEST_LISTED_NAMES_MAX = 1_000_000, 250_000

#: Names read from a directory before other calls are served: about two milliseconds.  And larger
#: directories being read at the same time, in all and by one guest.
NFS_NAMES_PER_STEP_MAX = 500
NFS_LARGE_LISTINGS_MAX, NFS_GUEST_LARGE_LISTINGS_MAX = 6, 1

#: Entries of one READDIR, and of one READDIRPLUS, which needs a lookup for each: some milliseconds.
NFS_READDIR_ENTRIES_MAX, NFS_READDIRPLUS_ENTRIES_MAX = 1024, 64

#: Seconds of answering calls before the sockets are polled again; datagrams received from one
#: socket then, as many as its kernel queue usually holds; and queued calls of one guest: clients
#: have a few in flight.
NFS_TURN_MAX_SECONDS = 0.005
NFS_DATAGRAMS_PER_TURN_MAX = 512
NFS_GUEST_WAITING_CALLS_MAX = 64

#: Bytes written to a file that a client keeps until the server has committed them.
NFS_UNCOMMITTED_MAX_BYTES = 4 << 20
