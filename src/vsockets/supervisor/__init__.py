"""Supervision of unmodified programs: the fabric answers their AF_VSOCK system calls.

A seccomp filter makes the kernel ask this process about the calls that concern AF_VSOCK, and about
no others; what the program gets for a vSockets socket is an ordinary unix socket that is, or
becomes, one end of a stream of the fabric.  ``docs/run.md`` has the mechanism and its reasons.
"""
