"""Recording what passes a forwarder, or a device, for Wireshark and its kin."""
