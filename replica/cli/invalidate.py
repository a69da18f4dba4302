"""``replicactl invalidate``."""

from replica.cli._common import daemon_command

COMMAND = daemon_command("invalidate", "declare the local copy bad: it is copied anew from the peer")
