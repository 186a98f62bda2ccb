"""Benchmarks of one GPU; with ``--tiny`` the same code runs in seconds on a CPU, and its figures mean nothing."""
