"""``replicactl wait-connect``: wait until the nodes are connected."""

import argparse

from replica.cli._common import Command
from replica.cli._wait import add_wait_arguments, wait_until


def _run(args: argparse.Namespace) -> int:
    return wait_until(args, "connected", lambda status: status["connection"] == "Connected")


COMMAND = Command("wait until this node is connected to its peer", _run, add_wait_arguments)
