"""vsockd: the hypervisor's role, for any hypervisor and for none.

vsockd knows every context, assigns ports, and brokers connections and datagram routes.  vsockd is
not on the data path: no byte of a stream and no datagram passes through it.
"""
