"""Emulated devices of virtual machines, one process for each machine.

The modules here are shared by all devices: guest memory, the event loop, the client of vsockd,
capture.
"""
