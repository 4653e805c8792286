"""VMware's GuestRPC over vSockets: the hypervisor service that VMware Tools talk to.

The guest's tools connect to two ports of the hypervisor, CID 0.  On port 976 (RPCI) the guest sends
requests, such as ``info-get guestinfo.userdata``.  On port 975 (TCLO) it waits for commands of the
host, such as ``OS_Halt``.  Both carry the same packets.
"""
