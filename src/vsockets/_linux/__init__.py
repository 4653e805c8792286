"""Linux primitives that several packages need: system calls, /proc, socket options."""
