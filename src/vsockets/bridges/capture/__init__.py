"""Recording what passes a forwarder, for Wireshark and its kin."""
