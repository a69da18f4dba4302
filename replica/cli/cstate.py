"""``replicactl cstate``: the state of the connection, as in "Connected"."""

from replica.cli._oneliner import oneliner

COMMAND = oneliner("print the state of the connection, as in Connected", lambda status: [status["connection"]])
