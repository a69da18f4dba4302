"""``replicactl dstate``: "UpToDate/UpToDate", this node first, a line per volume."""

from replica.cli._oneliner import oneliner

COMMAND = oneliner(
    "print the states of this node's disk and of the peer's, as in UpToDate/UpToDate",
    lambda status: [f"{volume['disk']}/{volume['peer_disk']}" for volume in status["volumes"]],
)
