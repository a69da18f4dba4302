"""``replicactl resize``."""

from replica.cli._common import daemon_command

COMMAND = daemon_command(
    "resize",
    "let the volume grow to the size of its backings, on both nodes",
    {"assume-clean": "what is new is the same on both nodes already: nothing of it is copied"},
)
