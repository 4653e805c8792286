"""Event loops, acceptors and service life, for vsockd, devices and proxies."""
