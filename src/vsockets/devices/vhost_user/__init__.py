"""The vhost-user protocol, back-end side: virtqueues of a device that is another process.

It knows rings and memory, and nothing of what the device does with them.
"""
