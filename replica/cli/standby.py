"""``replicactl standby``: give groups to the other node."""

import argparse

from replica.cli._cluster import add_ha_dir, load_cluster
from replica.cli._common import Command
from replica.cli._wait import positive_seconds
from replica.heartbeat import client

WHICH = ("all", "local", "foreign", "failback")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "which",
        metavar="GROUPS",
        nargs="?",
        choices=WHICH,
        default="all",
        help="all (the default), local: those that prefer this node, foreign or failback: those that prefer the other",
    )
    add_ha_dir(parser)
    parser.add_argument("--timeout", metavar="S", type=positive_seconds, help="give up waiting after S seconds")


def _run(args: argparse.Namespace) -> int:
    client.move(load_cluster(args), "standby", {"which": args.which}, args.timeout)
    return 0


COMMAND = Command("give this node's groups to the other node, and wait until they run there", _run, _add_arguments)
