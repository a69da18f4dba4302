"""What the tests with virtual machines share with those of the cluster."""

from tests.cluster.conftest import libnbd, seed

__all__ = ["libnbd", "seed"]
