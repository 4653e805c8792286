"""vsockd: the hypervisor's role, for any hypervisor and for none.

It knows every context, grants ports, brokers connections and datagram routes, and then
gets out of the way: no byte of a stream and no datagram passes through it.
"""
