"""Measurements: each `python -m bench.NAME` is one, each `make bench…` too; docs/benchmarks.md tells which is which."""
