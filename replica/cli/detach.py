"""``replicactl detach``."""

from replica.cli._common import daemon_command

COMMAND = daemon_command("detach", "close the backing file or device, to replace it")
