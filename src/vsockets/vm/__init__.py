"""Virtual machines: QEMU and its arguments, kernels, guests, their life cycle."""
