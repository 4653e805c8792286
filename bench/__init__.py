"""Benchmarks: vsockets and its peers, measured in turn in one run."""

import sys
from pathlib import Path

# The drivers of the device benchmarks are the tests'.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
