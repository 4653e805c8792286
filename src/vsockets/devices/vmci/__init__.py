"""VMware's VMCI device (PCI 15ad:0740): what the guide's vSockets were made for.

From the bottom up: :mod:`.registers` and :mod:`.datagrams` (numbers and layouts),
:mod:`.device` (registers, interrupts, datagrams in and out), :mod:`.hypervisor` (what the
guest's datagrams ask), :mod:`.queue_pair` (memory shared with the guest), :mod:`.packets`,
:mod:`.handshake` and :mod:`.stream` (vSockets over it).  docs/vmci.md draws the sequences.
"""
