"""``replicactl connect``."""

from replica.cli._common import daemon_command

COMMAND = daemon_command(
    "connect",
    "connect to the peer (after disconnect or a split brain)",
    {"discard-my-data": "resolve a split brain by giving up what only this copy has"},
)
