"""``replicactl resume-sync``."""

from replica.cli._common import daemon_command

COMMAND = daemon_command("resume-sync", "resume a paused resync")
