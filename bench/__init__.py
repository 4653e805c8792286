"""Benchmarks: ours beside its peers, in turn, in one run."""
