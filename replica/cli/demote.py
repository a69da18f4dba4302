"""``replicactl demote``."""

from replica.cli._common import daemon_command

COMMAND = daemon_command(
    "demote",
    "make this node Secondary: drain the clients, flush both copies, stop serving",
    {"force": "also while NBD clients are connected: end their requests, then disconnect them"},
)
