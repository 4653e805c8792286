"""Bridges: between vSockets and what else carries streams and datagrams."""
