"""Measurement of streams and datagrams over vSockets, and over TCP, UDP and unix sockets."""
