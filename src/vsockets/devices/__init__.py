"""What a virtual machine sees: emulated devices, one process for each machine.

Shared by all of them: the guest's memory, and moving bytes between its pages and a socket.
"""
