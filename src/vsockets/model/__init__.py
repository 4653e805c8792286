"""Values without I/O: constants, addresses, buffer sizes, rates."""
