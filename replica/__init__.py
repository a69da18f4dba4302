"""Replica: two-node block replication with failover, in user space."""

__version__ = "0.1.0"
