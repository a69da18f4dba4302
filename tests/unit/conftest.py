"""Fixtures of several modules."""

from tests.unit.nbd_bench import run

__all__ = ["run"]
