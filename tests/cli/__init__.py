"""Tests of the command line, by its users' means: real processes."""
