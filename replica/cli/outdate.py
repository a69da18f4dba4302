"""``replicactl outdate``."""

from replica.cli._common import daemon_command

COMMAND = daemon_command("outdate", "mark the local copy as behind the peer's: it cannot be promoted without --force")
