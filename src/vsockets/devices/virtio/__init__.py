"""The virtio-vsock device (virtio 1.3, 5.10): streams and sequenced packets of a guest."""
