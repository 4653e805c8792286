"""Limits that all device processes share, each with its reason."""

#: Bytes of a vhost-user message's payload: a table of eight regions has 264, a configuration space
#: at most 268.
VHOST_USER_PAYLOAD_MAX_BYTES = 4096

#: Descriptors of one message: one for each of eight regions.
VHOST_USER_DESCRIPTORS_MAX = 8

#: Time for a monitor to read a reply, in seconds; a monitor waits for each reply it requested.
VHOST_USER_REPLY_TIMEOUT_SECONDS = 5.0

#: Regions of memory that a monitor may add one by one (ADD_MEM_REG). QEMU requests this number and
#: never exceeds it; libvhost-user has 509 as well, the kernel's vhost 64.
VHOST_USER_MEMORY_SLOTS_MAX = 509

#: Regions of memory of one virtual machine.  QEMU maps some tens; each is a mapping and a
#: descriptor.
DMA_REGIONS_MAX = 1024

#: Buffers of one system call (UIO_MAXIOV).
IO_VECTORS_MAX = 1024

#: Descriptors and bytes of one vfio-user message: a device has a few interrupts, and registers of
#: four bytes.
VFIO_USER_DESCRIPTORS_MAX = 8
VFIO_USER_TRANSFER_MAX_BYTES = 4096

#: Time for a monitor to read a reply, in seconds; a monitor waits for each reply it requested.
VFIO_USER_REPLY_TIMEOUT_SECONDS = 5.0

#: Sockets that send datagrams for a guest's ports: the least recently used one is closed first.
DEVICE_DATAGRAM_PORTS_MAX = 256

#: Time that a device waits for vsockd, in seconds, while the guest's processor is stopped.  vsockd
#: replies in a tenth of a millisecond.
DEVICE_VSOCKD_REPLY_TIMEOUT_SECONDS = 0.5

#: Bytes of a guest's datagrams that wait for one receiver (VMCI_MAX_DATAGRAM_QUEUE_SIZE).
DEVICE_UNSENT_DATAGRAM_MAX_BYTES = 2 * 17 * 4096

#: Concurrent captures of one device: each costs the device a system call for each packet.
DEVICE_CAPTURES_MAX = 4

#: Longest system call of a device, in seconds: only closing a descriptor that a peer passed takes
#: longer, and a signal interrupts it.
DEVICE_SLOW_CALL_SECONDS = 0.005
