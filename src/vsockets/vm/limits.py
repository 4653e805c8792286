"""Limits of the virtual machine tools, each with its reason."""

#: Characters that are read of what a command says in a guest (vsockets.vm.guest_client): a digest,
#: a version, a complaint.
GUEST_OUTPUT_MAX_CHARACTERS = 65_536
