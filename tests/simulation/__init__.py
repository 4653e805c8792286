"""A deterministic simulator of vsockd's decisions and the devices' protocols.

docs/internals/simulation.md describes it.
"""
