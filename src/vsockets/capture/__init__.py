"""Capture files of the traffic of a forwarder or a device, for Wireshark and similar tools."""
