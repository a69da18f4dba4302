"""``replicactl invalidate-remote``."""

from replica.cli._common import daemon_command

COMMAND = daemon_command("invalidate-remote", "declare the peer's copy bad: it is copied anew from this node")
