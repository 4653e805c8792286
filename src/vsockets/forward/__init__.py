"""The forwarder: streams and datagrams from one address to another."""
