"""Played hypervisors: the vSockets of other VMMs, as their hosts and guests see them, in a test.

No virtual machine runs.  The guest is a context of a private fabric, whose programs are ordinary
processes.  :mod:`.personalities` has the facts about each VMM, :mod:`.machine` plays them.
"""
