"""``replicactl disconnect``."""

from replica.cli._common import daemon_command

COMMAND = daemon_command("disconnect", "drop the link to the peer and stay StandAlone")
