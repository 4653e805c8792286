"""Emulated devices of virtual machines, one process for each machine.

The modules of this folder are shared by all devices: guest memory, the event loop, the client of
vsockd, packet capture.  The folders have one device or protocol each.
"""
