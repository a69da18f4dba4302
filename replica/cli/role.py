"""``replicactl role``: "Primary/Secondary", this node first."""

from replica.cli._oneliner import oneliner

COMMAND = oneliner(
    "print the roles of this node and of its peer, as in Primary/Secondary",
    lambda status: [f"{status['role']}/{status['peer']['role']}"],
)
