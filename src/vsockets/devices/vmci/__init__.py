"""VMware's VMCI device (PCI 15ad:0740), the transport of VMware's guide to vSockets.

From bottom to top: :mod:`.packets` (layouts and numbers), :mod:`.device` (registers, interrupts,
datagrams to and from the guest), :mod:`.hypervisor` (hypercalls), :mod:`.queue_pair` (memory
shared with the guest).  vSockets use these: :mod:`.handshake`, :mod:`.stream` and
:mod:`.transport`.  docs/vmci.md shows the sequences of packets.
"""
