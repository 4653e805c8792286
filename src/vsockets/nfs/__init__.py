"""Network storage over vSockets datagrams: an NFS version 3 server, and a FUSE client."""
