"""The forwarder, which passes on streams and datagrams from one address to another."""
