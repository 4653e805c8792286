"""Limits of the virtual machine tools, each with its reason."""

#: Characters read of the output of a command in a guest (vsockets.vm.guest_client): enough for a
#: digest, a version or an error message.
GUEST_OUTPUT_MAX_CHARACTERS = 65_536
