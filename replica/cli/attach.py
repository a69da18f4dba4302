"""``replicactl attach``."""

from replica.cli._common import daemon_command

COMMAND = daemon_command("attach", "open the backing file or device again, after detach or a disk error")
