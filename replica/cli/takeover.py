"""``replicactl takeover``."""

from replica.cli._common import daemon_command

COMMAND = daemon_command("takeover", "switch over: the peer drains, flushes and demotes, and this node is promoted")
