"""``replicactl takeover-node``: get the groups of the other node."""

import argparse

from replica.cli._cluster import add_ha_dir, load_cluster
from replica.cli._common import Command
from replica.cli._wait import positive_seconds
from replica.heartbeat import client


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_ha_dir(parser)
    parser.add_argument("--timeout", metavar="S", type=positive_seconds, help="give up waiting after S seconds")


def _run(args: argparse.Namespace) -> int:
    client.move(load_cluster(args), "takeover-node", {}, args.timeout)
    return 0


COMMAND = Command("get all groups from the other node, and wait until they run here", _run, _add_arguments)
