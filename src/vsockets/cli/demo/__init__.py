"""The demonstrations of ``vsock demo`` and ``vsock vm demo``."""
