"""Measurements: ``make bench`` runs the ``bench_*`` files; ``python -m bench.peers`` compares with other servers."""
