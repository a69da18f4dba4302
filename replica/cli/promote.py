"""``replicactl promote``."""

from replica.cli._common import daemon_command

COMMAND = daemon_command(
    "promote",
    "make this node the Primary: it serves the data to NBD clients",
    {
        "force": "also on a brand-new pair (once) or on a copy that is not UpToDate: its data then wins",
        "peer-is-dead": "do not wait until the link to the peer is lost: only for who is certain that it does not run",
    },
)
