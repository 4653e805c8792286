"""Measurement of streams and datagrams, over vSockets and other sockets beside it."""
