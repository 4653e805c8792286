"""Limits of the GuestRPC service, each with its reason."""

#: Bytes of all variables that one guest has set, names and values: VMware's default of
#: ``tools.setInfo.sizeLimit``.
GUESTRPC_VARIABLES_MAX_BYTES = 1_048_576

#: Bytes of all variables that the host has set for one guest: those of the largest ``.vmx`` file.
GUESTRPC_HOST_VARIABLES_MAX_BYTES = 1_048_576

#: Variables that one guest may set: its tools and cloud-init set about twenty.
GUESTRPC_VARIABLES_MAX = 1024

#: Characters of a variable's name: several times the longest that is known
#: (``guestinfo.afterburn.initrd.network-kargs``).
GUESTRPC_NAME_MAX_CHARACTERS = 256

#: Bytes of a packet after its length: the largest variable with its request and its fields.
GUESTRPC_PACKET_MAX_BYTES = GUESTRPC_VARIABLES_MAX_BYTES + 4096

#: Bytes of a longer packet that are read and skipped, so that its sender gets a reply.
GUESTRPC_SKIPPED_MAX_BYTES = 16 * GUESTRPC_VARIABLES_MAX_BYTES

#: Fields of a packet: three are known.
GUESTRPC_FIELDS_MAX = 16

#: Connections of one guest at a time: a daemon has two for each user, one-shot tools have one each.
GUESTRPC_GUEST_CONNECTIONS_MAX = 64

#: Seconds in which the rest of a packet has to arrive, and a guest has to read a reply.
GUESTRPC_PACKET_TIMEOUT_SECONDS = 10.0

#: Seconds in which a guest's tools have to answer a command: they run scripts before some answers.
GUESTRPC_COMMAND_TIMEOUT_SECONDS = 30.0

#: Bytes of an option that a guest has its own tools set: those that are known have about 20.
GUESTRPC_OPTION_MAX_BYTES = 1024

#: Commands queued for one guest: an administrator sends one at a time.
GUESTRPC_COMMANDS_MAX = 16

#: Capabilities recorded for one guest, and characters of each claim of a guest that are kept.
GUESTRPC_CAPABILITIES_MAX, GUESTRPC_CLAIM_MAX_CHARACTERS = 64, 256

#: Seconds without a sign of life after which a guest's tools count as not running: they ping once a
#: second.
GUESTRPC_HEARTBEAT_SECONDS = 10.0

#: Bytes of a request at the control socket: all variables of a guest, as JSON, which has up to six
#: characters for a byte, and the names around them.
GUESTRPC_CONTROL_MAX_BYTES = 7 * GUESTRPC_HOST_VARIABLES_MAX_BYTES

#: Seconds between two starts of the process that serves, which is killed again and again.
GUESTRPC_RESTART_SECONDS = 1.0
