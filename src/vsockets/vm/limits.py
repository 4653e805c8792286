"""Limits of the virtual machine tools, each with its reason."""

#: Characters read of the output of a command in a guest (vsockets.vm.guest_client): enough for a
#: digest, a version or an error message.
GUEST_OUTPUT_MAX_CHARACTERS = 65_536

#: Bytes of one report of a guest's systemd, more than systemd itself accepts (NOTIFY_BUFFER_MAX).
VM_NOTIFY_MAX_BYTES = 8192

#: Characters of a report's field that are shown: systemd's own are a line of a terminal.
VM_NOTIFY_SHOWN_MAX_CHARACTERS = 256

#: Reports of a guest that are received at a time, each on a connection of its own, and the seconds
#: in which each has to end.
VM_NOTIFY_CONNECTIONS_MAX, VM_NOTIFY_TIMEOUT_SECONDS = 16, 10.0
