"""Measuring what streams and datagrams do, over vSockets and beside it."""
