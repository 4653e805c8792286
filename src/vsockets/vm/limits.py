"""Limits of the virtual machine tools, each with its reason."""

#: Characters read of the output of a command in a guest (vsockets.vm.guest_client): enough for a
#: digest, a version or an error message.
GUEST_OUTPUT_MAX_CHARACTERS = 65_536

#: Bytes of one report of a guest's systemd, more than systemd itself accepts (NOTIFY_BUFFER_MAX).
VM_NOTIFY_MAX_BYTES = 8192

#: Characters of a report's field that are shown: systemd's own are a line of a terminal.
VM_NOTIFY_SHOWN_MAX_CHARACTERS = 256

#: Fields shown last that are compared with the next one: systemd names the jobs that wait in turn.
VM_NOTIFY_REMEMBERED_MAX = 64

#: Reports of a guest that are received at a time, each on a connection of its own, and the seconds
#: in which each has to end.
VM_NOTIFY_CONNECTIONS_MAX, VM_NOTIFY_TIMEOUT_SECONDS = 16, 10.0

#: Bytes of one reply of a guest's qemu-ga: it keeps 16 MiB of a program's output and as many of its
#: errors, and sends them in base64.
VM_AGENT_REPLY_MAX_BYTES = 48 << 20

#: Bytes of a file in one request to qemu-ga, or in one reply: it has them in memory several times.
VM_AGENT_CHUNK_BYTES = 256 << 10

#: Seconds for a reply of qemu-ga; the longest is a chunk of a file, written to a slow disk.
VM_AGENT_REPLY_SECONDS = 60.0

#: Seconds for its first reply: while it serves another client, it does not accept this one.
VM_AGENT_SYNC_SECONDS = 10.0

#: Replies that are skipped until the first one that was asked for: an earlier client may have left
#: the reply to one request.
VM_AGENT_SYNC_SKIPPED_MAX = 16

#: Longest pause in seconds between two questions whether a program in the guest has ended.
VM_AGENT_POLL_MAX_SECONDS = 0.5

#: Characters of an error of qemu-ga that are shown: a line or two.
VM_AGENT_ERROR_MAX_CHARACTERS = 256

#: MiB of a file that is copied from a guest, if no limit is given: a guest could fill the disk.
VM_COPY_MAX_MIB = 1024

#: Seconds for systemd-machined to answer, and bytes of its reply, which names an error at most.
VM_MACHINED_SECONDS, VM_MACHINED_REPLY_MAX_BYTES = 10.0, 65_536
