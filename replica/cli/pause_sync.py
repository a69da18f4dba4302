"""``replicactl pause-sync``."""

from replica.cli._common import daemon_command

COMMAND = daemon_command("pause-sync", "pause the resync")
